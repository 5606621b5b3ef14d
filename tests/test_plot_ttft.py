"""The figure of times to first token."""

from eval.plot_ttft import newest


def test_a_figure_has_the_last_row_of_each_cell_of_one_model_on_one_device():
    cell = {"model": "a", "device": "d", "context": 8192, "method": "cacheclip", "ratio": 0.1, "caches": "pinned",
            "aux": "b", "speedup": 5.0}
    later, further = {**cell, "speedup": 6.0}, {**cell, "ratio": 0.2, "speedup": 3.0}
    without = {key: value for key, value in cell.items() if key != "speedup"}
    others = {**cell, "model": "c"}, {**cell, "device": "e"}
    assert newest([cell, further, later, without, *others], "a", "d") == [later, further]
