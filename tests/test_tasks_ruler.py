"""RULER's tasks: prompts word for word, lengths, seeds, and what is asked is what is hidden."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cacheclip_jax.errors import BadInput
from eval.tasks import RULER, Sample, make
from tests.samples import essay, hotpot, spans, squad

NEEDLES = [name for name in RULER if name.startswith("niah")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruler")
    text = essay(folder / "essay.txt")
    return {**dict.fromkeys(RULER, text), "qa_1": squad(folder / "squad.json"), "qa_2": hotpot(folder / "hotpot.json")}


@pytest.fixture(scope="module")
def ordered(files):
    def order(name: str, length: int = 1536, count: int = 2, **settings) -> list[Sample]:
        return make(name, tokenizer_spans=spans, length=length, count=count, data=files[name], **settings)

    return order


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("length", [1100, 5000])
def test_a_sample_fills_its_length_and_no_more(ordered, name, length):
    if name.startswith("qa") and length == 1100:
        length = 800  # the test's files hold little more
    for sample in ordered(name, length):
        # One more unit of haystack (a noise line, a needle of UUIDs, three words of cwe, a document) would not fit.
        assert length - 110 < sample.tokens(spans) <= length
        assert len(sample.context) > 1 or length < 2000
        assert sample.question == sample.question.strip() != ""


def test_the_same_seed_gives_the_same_bytes_in_every_process(ordered, files):
    code = ("import sys, hashlib\nfrom eval.tasks import make\nfrom tests.samples import spans\n"
            "for name, data in zip(sys.argv[1::2], sys.argv[2::2]):\n"
            "    made = make(name, tokenizer_spans=spans, length=1200, count=2, data=data)\n"
            "    print(hashlib.sha256('\\n'.join(s.to_json() for s in made).encode()).hexdigest())")
    here = [hashlib.sha256("\n".join(s.to_json() for s in ordered(name, 1200)).encode()).hexdigest()
            for name in RULER]
    arguments = [str(x) for name in RULER for x in (name, files[name])]
    there = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(Path.cwd())})
    assert there.stdout.split() == here


@pytest.mark.parametrize("name", [n for n in RULER if not n.startswith("qa")])
def test_samples_don_t_depend_on_how_many_are_made_and_splits_share_none(ordered, name):
    assert ordered(name, 1200, 3)[:2] == ordered(name, 1200, 2)
    texts = {s.text for split in ("tune", "report") for seed in (0, 1)
             for s in ordered(name, 1200, split=split, seed=seed)}
    assert len(texts) == 8


@pytest.mark.parametrize("name", RULER)
def test_the_shared_prefix_is_the_same_for_all_samples_of_a_seed(ordered, name):
    assert len({s.instructions for s in ordered(name, count=3)}) == 1


@pytest.mark.parametrize("name", NEEDLES)
def test_every_answer_stands_once_in_the_context_behind_its_key(ordered, name):
    keys = {"niah_multiquery": 4}.get(name, 1)
    values = {"niah_multivalue": 4}.get(name, 1)
    for sample in ordered(name, count=3):
        context = "".join(sample.context)
        asked = re.search(r" for (.*) mentioned in", sample.question)[1].replace(", and ", ", ").split(", ")
        assert len(asked) == keys and len(sample.references) == keys * values
        for i, answer in enumerate(sample.references):
            assert context.count(answer) == 1
            assert re.search(rf"One of the special magic \w+ for {re.escape(asked[i // values])} is: {answer}\.",
                             context)
        for start, end in sample.meta["facts"]:
            assert any(answer in context[start:end] for answer in sample.references)
        assert sample.score(" ".join(sample.references)) == 1
        assert sample.score("none") == 0


def test_needle_prompts_are_rulers(ordered):
    one = ordered("niah_single_1", count=1)[0]
    key, value = re.search(r"One of the special magic numbers for (\S+) is: (\d{7})\.", one.text).groups()
    lines = "".join(one.context).splitlines()
    assert Counter(lines).most_common(1)[0][0] == ("The grass is green. The sky is blue. The sun is yellow. "
                                                   "Here we go. There and back again.")
    assert one.text == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n" + "\n".join(lines) + f"\nWhat is the special magic number for {key} mentioned in "
        f"the provided text? The special magic number for {key} mentioned in the provided text is")
    assert one.references == (value,) and one.max_new_tokens == 128

    many = ordered("niah_multiquery", count=1)[0]
    assert many.instructions.startswith("Some special magic numbers are hidden within the following text.")
    assert re.fullmatch(r"What are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned in the provided "
                        r"text\?", many.question)
    assert re.fullmatch(r" The special magic numbers for .* mentioned in the provided text are", many.answer_prefix)


def test_needles_are_of_rulers_kinds(ordered):
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, ordered("niah_single_3")[0].references[0])
    hay = "".join(ordered("niah_multikey_3")[0].context).splitlines()
    assert all(re.fullmatch(rf"One of the special magic uuids for {uuid} is: {uuid}\.", line) for line in hay)
    assert len({line.split()[7] for line in hay}) == len(hay)  # no key twice
    assert "".join(ordered("niah_multikey_1")[0].context).count("One of the special magic numbers") == 4


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multikey_1"])
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_the_needle_goes_where_the_depth_says(ordered, name, depth):
    for sample in ordered(name, 4096, depth=depth):
        assert sample.meta["depth"] == pytest.approx(depth, abs=4)


def test_natural_text_is_the_files_and_repeats_where_it_is_short(ordered, files):
    sample = ordered("niah_single_2", 6000, count=1)[0]
    text = re.sub(r"One of the special magic numbers for .* is: \d{7}\. ?", "", "".join(sample.context))
    words = files["niah_single_2"].read_text().split()
    assert text.split() == (words * 9)[: len(text.split())] and len(text.split()) > len(words)


@pytest.mark.parametrize("cut", ["fact", "answer"])
@pytest.mark.parametrize("name", ["niah_single_1", "niah_multivalue", "niah_multiquery", "niah_multikey_3", "vt"])
def test_a_cut_leaves_no_chunk_with_a_whole_fact(ordered, name, cut):
    for sample in ordered(name, 2000, cut=cut, chunk_tokens=128):
        context = "".join(sample.context)
        whole = ordered(name, 2000)[0]
        for start, end in sample.meta["facts"]:
            assert not any(context[start:end] in chunk for chunk in sample.context)
        if cut == "answer" and name != "vt":
            assert not any(answer in chunk for answer in sample.references for chunk in sample.context)
        assert len(sample.context) > len(whole.context)


def test_variables_follow_from_the_value_in_four_hops(ordered):
    for sample in ordered("vt", count=3):
        context = "".join(sample.context)
        value = re.search(r"assigned the value (\d{5}) in", sample.question)[1]
        found = [re.search(rf"^VAR ([A-Z]{{5}}) = {value}$", context, re.M)[1]]
        while (step := re.search(rf"^VAR ([A-Z]{{5}}) = VAR {found[-1]} $", context, re.M)) is not None:
            assert step.start() > context.index(f"VAR {found[-1]} =")
            found.append(step[1])
        assert tuple(found) == sample.references and len(found) == 5
        assert sample.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned "
            f"the value {value}, they are: ")
        example = sample.instructions.removesuffix(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n")
        assert re.search(r"they are:  [A-Z]{3} [A-Z]{3} [A-Z]{3} [A-Z]{3} [A-Z]{3}\n\n$", example)
        assert len(spans(example)) < 520


def test_more_chains_distract_and_are_not_asked_for(ordered):
    sample = ordered("vt", count=1, chains=3, hops=2)[0]
    assert len(re.findall(r"^VAR \w+ = \d", "".join(sample.context), re.M)) == 3
    assert len(sample.references) == 3


@pytest.mark.parametrize(("length", "often", "rarely"), [(1200, 6, 1), (5000, 30, 3)])
def test_common_words_repeat_as_often_as_ruler_has_them(ordered, length, often, rarely):
    sample = ordered("cwe", length, count=1)[0]
    context = "".join(sample.context).strip()
    words = re.split(r"(?:^| )\d+\. ", context)[1:]
    counts = Counter(words)
    assert {counts[w] for w in sample.references} == {often} and len(sample.references) == 10
    assert {n for w, n in counts.items() if w not in sample.references} == {rarely}
    assert context.startswith("1. ") and f" {len(words)}. " in context
    assert re.search(r"list are: 1\. .* 10\. .*\nBelow is a numbered list", sample.instructions)


def test_the_three_frequent_coded_words_are_the_answer(ordered):
    for length in (1024, 8000):
        sample = ordered("fwe", length, count=1)[0]
        ranked = Counter("".join(sample.context).split()).most_common(5)
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(sample.references)
        assert ranked[3][1] > ranked[4][1]
        assert ranked[0][1] / ranked[1][1] == pytest.approx(4, rel=0.1)  # Zipf, alpha 2
        assert all(re.fullmatch("[a-z]{6}", word) for word in sample.references)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_documents_hold_the_answer_are_numbered_and_one_a_chunk(ordered, name):
    for sample in ordered(name, 2000, count=4):
        assert any(a in "".join(sample.context) for a in sample.references)
        assert [chunk.split("\n")[0] for chunk in sample.context] == [
            f"Document {i + 1}:" for i in range(len(sample.context))]
        assert all(chunk.endswith("\n\n") for chunk in sample.context)
        gold = [sample.context[i] for i in sample.meta["gold"]]
        assert len(gold) >= (2 if name == "qa_2" else 1)
        assert sample.text.endswith(f"\n\nQuestion: {sample.question.split('Question: ')[1]} Answer:")
        assert sample.metric == "string_match_part" and sample.max_new_tokens == 32


def test_documents_of_the_same_article_come_before_those_of_others(ordered):
    sample = ordered("qa_1", 260, count=1)[0]
    house = re.search(r"house (\d+) ", sample.question)[1]
    assert sum(f"house number {house} " in chunk for chunk in sample.context) == min(3, len(sample.context))


def test_unanswerable_questions_are_left_out(files):
    made = make("qa_1", tokenizer_spans=spans, length=800, split="all", data=files["qa_1"])
    assert len(made) == 18 and not any("can't be known" in s.question for s in made)


def test_room_is_kept_for_the_chat_template(ordered):
    assert 1430 < ordered("niah_single_2", 1536, template_tokens=100)[0].tokens(spans) <= 1436


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("niah_single_9", {}, "niah_single_1"),
    ("niah_single_1", {"deep": 3}, "depth"),
    ("niah_single_1", {"length": 60}, "limit is 60"),
    ("niah_single_1", {"length": None}, "length="),
    ("niah_single_2", {"data": None}, "data="),
    ("niah_single_1", {"depth": 101}, "0 to 100"),
    ("niah_single_1", {"cut": "both"}, "fact, answer"),
    ("niah_single_1", {"split": "all"}, "tune or report"),
    ("niah_single_1", {"split": "test"}, "tune, report or all"),
    ("niah_single_1", {"count": 0}, "count=0"),
    ("niah_single_1", {"chunk_tokens": 0}, "chunk_tokens=0"),
    ("niah_single_2", {"values": 50}, "40 needles"),
    ("vt", {"hops": 0}, "hops=0"),
    ("cwe", {"common_repeats": 2, "uncommon_repeats": 3}, "repeat more"),
    ("cwe", {"length": 400_000}, "more than the"),
    ("fwe", {"alpha": 1.0}, "alpha=1.0"),
    ("qa_1", {"count": 999}, "count=999"),
])
def test_what_can_t_be_made_is_refused_with_the_way_out(files, name, settings, message):
    order = {"length": 1000, "count": 1, "data": files.get(name), **settings}
    with pytest.raises(BadInput, match=message):
        make(name, tokenizer_spans=spans, **order)


def test_samples_survive_json(ordered):
    sample = ordered("niah_multivalue")[0]
    assert Sample.from_json(sample.to_json()) == sample
