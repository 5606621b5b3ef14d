"""LongBench: prompts come out whole, chunks follow the rule of the data set, truncation takes the middle."""

import json
import zipfile
from pathlib import Path

import pytest

import eval.tasks.longbench as longbench
from cacheclip_jax.errors import BadInput
from eval.tasks import TASKS, make
from tests.samples import spans

OWN = json.loads(Path(longbench.__file__).with_name("longbench.json").read_text(encoding="utf-8"))

CONTEXTS = {
    "hotpotqa": "".join(f"Passage {i}:\nTitle {i}\nSome {{braces}} and words of number {i}.\n\n" for i in range(1, 9)),
    "passage_count": "".join(f"Paragraph {i}: words of number {i}.\n\n" for i in range(1, 9)),
    "passage_retrieval_zh": "".join(f"段落{i}：一些文字。\n\n" for i in range(1, 9)),  # noqa: RUF001
    "dureader": "".join(f"文章{i}\n标题：甲\n正文。\n\n" for i in range(1, 9)),  # noqa: RUF001
    "trec": "".join(f"Question: What is thing {i} ?\nType: Thing\n" for i in range(1, 9)),
    "triviaqa": "".join(f"Passage:\nwords {i}\nQuestion:\nwho {i}\nAnswer:\nme {i}\n\n\n" for i in range(1, 9)),
    "samsum": "".join(f"Dialogue: A: hi {i}\r\nB: hello\nSummary: they greet {i}.\n" for i in range(1, 9)),
}


@pytest.fixture
def folder(tmp_path):
    for name in (*longbench.DATASETS, "hotpotqa_e"):
        context = CONTEXTS.get(name.removesuffix("_e"), "A plain story of many words. " * 40)
        answers = {"passage_retrieval_en": ["Paragraph 3"], "passage_retrieval_zh": ["段落3"], "passage_count": ["3"],
                   "trec": ["Thing"], "lsht": ["Thing"]}.get(name, ["the answer"])
        rows = [{"input": f"What is asked, {name} number {i}?", "context": context, "answers": answers, "length": 10,
                 "dataset": name, "language": "en", "all_classes": ["Thing", "Person"] if name in ("trec", "lsht")
                 else None, "_id": f"{name}-{i}"} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows),
                                                encoding="utf-8")
    return tmp_path


def made(folder, name, **settings):
    return make(f"longbench_{name}", **{"tokenizer_spans": spans, "data": folder, "split": "all", **settings})


@pytest.mark.parametrize("name", longbench.DATASETS)
def test_the_parts_make_up_longbenchs_prompt(folder, name):
    for sample in made(folder, name):
        number = sample.meta["source"].rsplit("-", 1)[1]
        context = CONTEXTS.get(name, "A plain story of many words. " * 40)
        assert sample.text == OWN["prompts"][name].replace("{input}", f"What is asked, {name} number {number}?"
                                                           ).replace("{context}", context)
        assert sample.question == sample.question.lstrip() and sample.context[-1][-1:] != ""
        assert sample.max_new_tokens == OWN["max_new_tokens"][name]
        assert sample.score(sample.references[0]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("name", "chunks"), [
    ("hotpotqa", 8), ("passage_count", 8), ("passage_retrieval_zh", 8), ("dureader", 8), ("hotpotqa_e", 8),
    ("narrativeqa", 5), ("lcc", 5), ("musique", 5)])
def test_passages_are_chunks_and_other_texts_are_windows(folder, name, chunks):
    for sample in made(folder, name, chunk_tokens=60):
        assert len(sample.context) == chunks


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum"])
def test_examples_are_packed_whole(folder, name):
    start = CONTEXTS[name][:8]
    for sample in made(folder, name, chunk_tokens=40):
        assert 1 < len(sample.context) < 8
        assert all(chunk.startswith(start) for chunk in sample.context)
        assert all(len(spans(chunk)) <= 43 for chunk in sample.context)


def test_what_longbench_does_to_prompt_and_answer_is_in_meta(folder):
    trec, hotpot = made(folder, "trec")[0], made(folder, "hotpotqa")[0]
    assert (trec.meta["chat"], trec.meta["first_line"], hotpot.meta["chat"]) == (False, True, True)
    assert trec.score("Thing\nQuestion: Person") == 1 and trec.score("Person") == 0


@pytest.mark.parametrize("name", ["narrativeqa", "hotpotqa", "lcc"])
def test_a_length_takes_the_middle_out_and_keeps_both_ends(folder, name):
    length = 160 if name == "hotpotqa" else 260
    for short, whole in zip(made(folder, name, length=length), made(folder, name), strict=True):
        assert length - 15 < short.tokens(spans) <= length
        context, full = "".join(short.context), "".join(whole.context)
        assert short.meta["truncated"] and not whole.meta["truncated"]
        assert (short.instructions, short.question) == (whole.instructions, whole.question)
        kept = next(i for i in range(len(context)) if not full.startswith(context[: i + 1]))
        assert 0 < kept < len(context) and full.endswith(context[kept:])


def test_the_archive_serves_as_well_as_the_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(folder / "qasper.jsonl", "data/qasper.jsonl")
    assert made(tmp_path / "data.zip", "qasper") == made(folder, "qasper") == made(folder / "qasper.jsonl", "qasper")
    with pytest.raises(BadInput, match=r"trec\.jsonl"):
        made(tmp_path / "data.zip", "trec")


def test_prompts_and_lengths_may_come_from_files(folder, tmp_path):
    prompts, lengths = tmp_path / "p.json", tmp_path / "m.json"
    prompts.write_text(json.dumps({"qasper": "Read: {context} Now: {input}"}))
    lengths.write_text(json.dumps({"qasper": 7}))
    sample = made(folder, "qasper", prompts=prompts, answer_lengths=lengths)[0]
    assert sample.instructions == "Read: " and sample.max_new_tokens == 7
    assert sample.question.startswith("Now: What is asked, qasper")
    with pytest.raises(BadInput, match="trec"):
        made(folder, "trec", prompts=prompts)
    prompts.write_text(json.dumps({"qasper": "no place for it"}))
    with pytest.raises(BadInput, match="context"):
        made(folder, "qasper", prompts=prompts)


def test_there_is_a_task_for_each_data_set_and_each_of_longbench_e():
    assert set(OWN["prompts"]) == set(OWN["max_new_tokens"]) == set(longbench.DATASETS)
    assert sum(name.startswith("longbench_") for name in TASKS) == 21 + 13


def test_without_a_network_the_error_says_what_to_fetch(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(BadInput, match=r"data\.zip .*LongBench"):
        make("longbench_trec", tokenizer_spans=spans)


def test_no_room_for_context_and_broken_lines_are_refused(folder):
    with pytest.raises(BadInput, match="leaves no room"):
        made(folder, "narrativeqa", length=130)
    (folder / "lcc.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match="input, context and answers"):
        made(folder, "lcc")
