"""Question sets from local files: what is asked can be read, gold is where it is said to be, counts are right."""

import os
from pathlib import Path

import pytest

from cacheclip_jax.errors import BadInput
from eval.tasks import LOCAL, Sample, make
from eval.tasks.haystack import natural_words, sentences
from tests.samples import ctxs, essay, hotpot, records, spans, squad, write


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return {"musique": ctxs(folder / "musique.json"), "2wikimqa": ctxs(folder / "wikimqa.json", nested=True),
            "hotpotqa": hotpot(folder / "hotpot.jsonl"), "nq": ctxs(folder / "nq.jsonl.gz", passages=1),
            "squad": squad(folder / "squad.json"), "kv": records(folder / "kv.jsonl.gz")}


@pytest.fixture(scope="module")
def ordered(files):
    def order(name: str, **settings) -> list[Sample]:
        return make(name, **{"tokenizer_spans": spans, "data": files[name], "split": "all", **settings})

    return order


@pytest.mark.parametrize("name", LOCAL)
def test_the_gold_chunk_holds_the_answer_and_facts_point_to_it(ordered, name):
    for sample in ordered(name):
        context = "".join(sample.context)
        assert sample.meta["gold"]
        start, end = sample.meta["facts"][-1]
        answer = sample.references[0].lower()
        assert answer in context[start:end].lower()
        assert answer in sample.context[sample.meta["gold"][-1]].lower()
        assert sample.score(sample.references[0]) == 1 and sample.score("") == 0


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("cut", ["fact", "answer"])
def test_a_cut_leaves_no_chunk_with_a_whole_fact_or_answer(ordered, name, cut):
    for sample, whole in zip(ordered(name, cut=cut), ordered(name), strict=True):
        assert sample.text == whole.text and len(sample.context) > len(whole.context)
        start, end = sample.meta["facts"][-1]
        fact = sample.text[len(sample.instructions) :][start:end]
        pieces = [sample.context[i] for i in sample.meta["gold"]]
        assert not any(fact in piece for piece in pieces)
        assert cut == "fact" or not any(sample.references[0].lower() in piece.lower() for piece in pieces)


@pytest.mark.parametrize("name", LOCAL)
def test_the_splits_share_no_question_whatever_the_seed(ordered, name):
    tune, report = ({s.question for s in ordered(name, split=split, seed=seed)} for split, seed in
                    (("tune", 0), ("report", 5)))
    assert not tune & report
    assert tune | report == {s.question for s in ordered(name)}


@pytest.mark.parametrize("name", LOCAL)
def test_the_same_order_gives_the_same_samples(ordered, name):
    assert ordered(name, count=3, seed=2) == ordered(name, count=3, seed=2)


@pytest.mark.parametrize(("name", "length"), [("musique", 150), ("2wikimqa", 150), ("hotpotqa", 160), ("nq", 200),
                                              ("squad", 200), ("kv", 300)])
def test_a_length_keeps_as_much_as_fits_and_always_the_gold(ordered, name, length):
    for short, whole in zip(ordered(name, length=length), ordered(name, length=5000), strict=True):
        assert short.tokens(spans) <= length
        assert len("".join(short.context)) < len("".join(whole.context))
        assert short.meta["gold"]


@pytest.mark.parametrize("name", ["musique", "hotpotqa"])
def test_given_passages_keep_their_order_and_some_of_them_include_the_gold(ordered, name):
    for few, all_ in zip(ordered(name, passages=4), ordered(name), strict=True):
        assert len(few.context) == 4 and len(all_.context) == 10
        kept = [all_.context.index(chunk) for chunk in few.context]
        assert kept == sorted(kept)
        assert {all_.context[i] for i in all_.meta["gold"]} <= set(few.context)


@pytest.mark.parametrize(("position", "index"), [("first", 0), ("middle", 4), ("last", 7), (0.25, 2), (1, 7)])
def test_the_right_passage_stands_where_the_position_says(ordered, position, index):
    for sample in ordered("nq", distractors=7, position=position):
        assert len(sample.context) == 8 and sample.meta["gold"] == [index]


def test_distractors_never_hold_an_answer_and_differ_from_each_other(ordered):
    for sample in ordered("nq", distractors=20):
        others = [chunk for i, chunk in enumerate(sample.context) if i not in sample.meta["gold"]]
        assert len(set(others)) == 20
        assert not any(sample.references[0].lower() in chunk.lower() for chunk in others)


def test_the_position_changes_nothing_but_the_order(ordered):
    first, last = (ordered("nq", distractors=5, position=p) for p in ("first", "last"))
    assert [sorted(s.context) for s in first] == [sorted(s.context) for s in last]


def test_key_value_chunks_are_windows_of_whole_records(ordered):
    for sample in ordered("kv", window=6):
        assert [chunk.strip().count("\n") + 1 for chunk in sample.context] == [6, 6, 6, 2]
        text = "".join(sample.context)
        assert text.startswith('{"key-') and text.endswith('"}\n\n')
        key = sample.question.split('"')[1]
        assert f'"{key}": "{sample.references[0]}"' in sample.context[sample.meta["gold"][0]]


def test_fewer_records_put_the_right_one_where_the_position_says(ordered):
    for sample in ordered("kv", records=5, position=1.0, window=1):
        assert len(sample.context) == 5 and sample.meta["gold"] == [4]


def test_passages_are_in_composed_unicode(tmp_path):
    path = write(tmp_path / "one.json", [{"question": "who ?", "answers": ["Zoe\u0308"],
                                          "ctxs": [{"title": "", "text": "Zoe\u0308 did"}]}])
    sample = make("musique", tokenizer_spans=spans, data=path, split="all")[0]
    assert sample.references == ("Zo\u00eb",) and sample.context[0].startswith("Zo\u00eb did")


@pytest.mark.parametrize(("layout", "name"), [(ctxs, "a.json"), (hotpot, "b.jsonl"), (squad, "c.json")])
def test_any_layout_serves_as_a_haystack(tmp_path, layout, name):
    assert len(natural_words(layout(tmp_path / name))) > 50
    assert natural_words(write(tmp_path / "pg.json", {"text": "a b\n\nc"})) == ("a", "b", "c")


def test_a_folder_of_text_files_serves_as_a_haystack(tmp_path):
    essay(tmp_path / "one.txt", 3)
    essay(tmp_path / "two.md", 2)
    assert len(natural_words(tmp_path)) == 5 * 14


def test_sentences_end_at_marks_and_quotes_and_not_within_words():
    assert sentences('He said "no." Then 3.5 left! Why?  \n So.') == ['He said "no."', "Then 3.5 left!", "Why?", "So."]


@pytest.mark.parametrize(("content", "message"), [
    ([{"question": "q", "answers": ["a"]}], "ctxs"), ("{", "isn't JSON"), ([3], "layout")])
def test_files_in_another_layout_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content) if isinstance(content, str) else write(path, content)
    with pytest.raises(BadInput, match=message) as error:
        make("musique", tokenizer_spans=spans, data=path)
    assert "broken.json" in str(error.value)
    with pytest.raises(BadInput, match="can't be read"):
        make("musique", tokenizer_spans=spans, data=tmp_path / "missing.json")


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("nq", {"position": "front"}, "middle"), ("nq", {"distractors": 500}, "29 other"), ("nq", {"length": 20}, "20"),
    ("musique", {"passages": 0}, "passages=0"), ("kv", {"window": 0}, "window=0"), ("kv", {"position": 2}, "0 to 1")])
def test_what_can_t_be_made_is_refused(ordered, name, settings, message):
    with pytest.raises(BadInput, match=message):
        ordered(name, **settings)


@pytest.mark.parametrize(("name", "file", "count", "chunks"), [
    ("musique", "musique_s_100.json", 100, 10), ("2wikimqa", "wikimqa_s_clean_68.json", 68, 10),
    ("hotpotqa", "hotpot_distractor_70.jsonl", 70, 10), ("nq", "nq_open_oracle_2000.jsonl.gz", 2000, 12),
    ("squad", "xquad.en.json", 1190, 12), ("kv", "kv_retrieval_75_keys_300.jsonl.gz", 300, 10)])
def test_the_real_files_load_whole(name, file, count, chunks):
    path = Path(os.environ.get("CACHECLIP_EVAL_DATA", "eval-data")) / file
    if not path.exists():
        pytest.skip(f"{path} isn't there: set CACHECLIP_EVAL_DATA to the folder that holds it")
    tune, report = (make(name, tokenizer_spans=spans, data=path, split=split) for split in ("tune", "report"))
    made = tune + report
    assert len(made) == count
    assert abs(len(tune) - count / 2) < 3 * (count / 4) ** 0.5  # a fair coin's three standard deviations
    assert max(len(s.context) for s in made) == chunks
    assert len({s.id for s in made}) == count
