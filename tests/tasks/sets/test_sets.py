"""The tasks on small files in their published layouts, on the real slices where those are, and a stand-in for the hub."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fastreft.tasks.errors import UserError
from fastreft.tasks.sets import Record, find, names, register, register_family, registry, training_records

BOOLQ = {
    "instruction": "Please answer the following question with true or false, question: is ice cold?\n\n"
    "Answer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


@pytest.fixture
def own(monkeypatch):
    """A registry that a test may add to."""
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def one(name: str, split: str, folder: Path) -> Record:
    (record,) = find(name)[0].records(split, folder)
    return record


@pytest.mark.parametrize("place", ["boolq/test.json", "dataset/boolq/test.json"])
def test_llm_adapters_files(tmp_path, place):
    put(tmp_path / place, [BOOLQ])
    record = one("BoolQ", "test", tmp_path)
    assert record.prompt == BOOLQ["instruction"] + "\n" and record.completion == "the correct answer is true"
    assert find("boolq")[0].answer_of(record.completion) == record.answer == "true"


def test_a_family_is_trained_on_its_file_and_scored_set_by_set(tmp_path):
    other = BOOLQ | {"instruction": "another"}
    put(tmp_path / "ft-training_set/commonsense_170k.json", [BOOLQ, other])
    put(tmp_path / "dataset/boolq/test.json", [BOOLQ])
    records, left_out = training_records("commonsense", tmp_path)
    assert [record.about["instruction"] for record in records] == [
        "another"
    ] and left_out == 1  # the test's is left out
    assert len(find("commonsense")) == 8


def test_gsm8k_has_two_layouts(tmp_path):
    solution = "He has 3+4=<<3+4=7>>7.\n#### 1,007"
    put(tmp_path / "gsm8k/train.jsonl", json.dumps({"question": "How many?", "answer": solution}))
    put(
        tmp_path / "gsm8k/test.json",
        [{"instruction": "How many?", "output": "\nA: 7. The answer is 7.", "answer": "7.0"}],
    )
    own, adapters = one("gsm8k", "train", tmp_path), one("gsm8k", "test", tmp_path)
    assert own.answer == 1007 and own.completion.endswith("The final answer is: 1,007")
    assert own.prompt.startswith("How many?\nAnswer the above question.")
    assert adapters.answer == 7 and adapters.prompt.endswith("How many?\n\n### Response:\n")
    assert adapters.completion == "A: 7. The answer is 7."


def test_answers_of_arithmetic(tmp_path):
    put(
        tmp_path / "AQuA/test.json", [{"instruction": "Which?", "output": "It is so.The answer is (D).", "answer": "A"}]
    )
    put(tmp_path / "mawps/trainset.json", [{"original_text": "2 and 2 ?", "equation": "X=2+2", "ans": 4.0}])
    assert one("AQuA", "test", tmp_path).answer == "A"
    mawps = one("mawps", "train", tmp_path)
    assert mawps.answer == 4.0 and mawps.completion == "The answer is 4."
    put(tmp_path / "AQuA/test.json", [{"instruction": "Which?", "answer": "yes"}])
    with pytest.raises(UserError, match=r"answer in record 1 of .* is 'yes'"):
        one("AQuA", "test", tmp_path)


def test_instructions(tmp_path):
    put(tmp_path / "alpaca/train.json", [{"instruction": "Sum up.", "input": "A long text.", "output": "Short."}])
    put(tmp_path / "alpaca_eval.json", [{"instruction": "Who?", "output": "He.", "dataset": "koala"}])
    record = one("alpaca", "train", tmp_path)
    assert "### Input:\nA long text.\n" in record.prompt and record.completion == "Short."
    asked = one("alpaca", "test", tmp_path)
    assert "Input" not in asked.prompt and asked.about == {"instruction": "Who?", "dataset": "koala"}
    assert find("alpaca")[0].metrics == ()


GLUE = {
    "CoLA/train.tsv": ("cola", "gj04\t0\t*\tHe \"goed.\n", Record('He "goed.', answer=0)),
    "SST-2/dev.tsv": ("sst2", "sentence\tlabel\na fine film \t1\n", Record("a fine film ", answer=1)),
    "MRPC/train.tsv": (
        "mrpc",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe said \" yes .\t\" Yes , \" he said .\n",
        Record('He said " yes .', answer=1, pair='" Yes , " he said .'),
    ),
    "RTE/dev.tsv": ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n", Record("a", answer=1, pair="b")),
    "MNLI/dev_matched.tsv": (
        "mnli",
        "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tcontradiction\n",
        Record("a", answer=2, pair="b"),
    ),
    "QQP/train.tsv": (  # GLUE's own has lines that are cut off
        "qqp",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\n1\t3\t4\tc\n",
        Record("a", answer=1, pair="b"),
    ),
    "STS-B/train.tsv": ("stsb", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.4\n", Record("a", answer=3.4, pair="b")),
}  # fmt: skip


@pytest.mark.parametrize("place", GLUE)
def test_glue_tables(tmp_path, place):
    name, text, wanted = GLUE[place]
    put(tmp_path / place, text)
    assert one(name, "train" if "train" in place else "test", tmp_path) == wanted


def test_a_label_that_is_none(tmp_path):
    put(tmp_path / "RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    with pytest.raises(UserError, match=r"'label' in line 2 of .* is 'maybe'; it must be one of entailment, not_ent"):
        one("rte", "test", tmp_path)
    put(tmp_path / "RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n")
    with pytest.raises(UserError, match=r"line 2 of .* has 3 columns, and 4 are wanted"):
        one("rte", "test", tmp_path)


def test_labelled_texts(tmp_path):
    put(tmp_path / "train.csv", 'text,category\n"Where, please?",card_arrival\n')
    put(tmp_path / "data_full.json", {"train": [["hi", "greeting"]], "oos_train": [["?", "oos"]]})
    assert one("banking77", "train", tmp_path) == Record("Where, please?", answer="card_arrival")
    assert [r.answer for r in find("clinc150")[0].records("train", tmp_path)] == ["greeting", "oos"]
    with pytest.raises(UserError, match="is not CLINC150's"):
        find("clinc150")[0].records("test", tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no task 'bolq'; did you mean 'boolq'"):
        find("bolq")
    with pytest.raises(UserError, match=r"has none of piqa/train.json, dataset/piqa/train.json"):
        training_records("piqa", tmp_path)
    with pytest.raises(UserError, match="give --data_dir"):
        training_records("SVAMP", None)


def test_a_task_of_ones_own(own, tmp_path):
    @register("capitals", answer_of=str.strip)
    def capitals(split, folder):
        yield Record("The capital of France is", " Paris", "Paris")

    register_family("places", ["capitals"])
    assert "capitals" in names() and find("places") == find("Capitals")
    assert find("capitals")[0].answer_of(" Paris") == "Paris"
    with pytest.raises(UserError, match="no training records"):  # all of them are the test's
        training_records("capitals", tmp_path)
    with pytest.raises(ValueError, match="kind is 'sing'"):
        register("songs", kind="sing")(capitals)


HUB = {
    "boolq": ({"question": "is ice cold", "answer": True}, BOOLQ["instruction"], "true"),
    "piqa": (
        {"goal": "Cut it", "sol1": "With a knife", "sol2": "With tea", "label": 0},
        "Please choose the correct solution to the question: Cut it\n\nSolution1: With a knife\n\nSolution2: With tea\n\n"
        "Answer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        {"context": "Al ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "Please choose the correct answer to the question: Al ran. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "ARC-Easy": (
        {"question": "What?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "Please choose the correct answer to the question: What?\n\nAnswer1: x Answer2: y\n\nAnswer format: answer1/answer2",
        "answer2",
    ),
    "winogrande": (
        {"sentence": "_ ran.", "option1": "Al", "option2": "Bo", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: _ ran.\n\n"
        "Option1: Al Option2: Bo\n\nAnswer format: option1/option2",
        "option1",
    ),
    "hellaswag": (
        {"activity_label": "Running", "ctx_a": "He runs.", "ctx_b": "then he", "endings": ["a", "b", "c", "d"], "label": "2"},
        "Please choose the correct ending to complete the given sentence: Running: He runs. Then he\n\n"
        "Ending1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_records_are_put_into_the_same_words(monkeypatch, name):
    row, instruction, answer = HUB[name]
    monkeypatch.setattr("fastreft.tasks.sets.commonsense.from_hub", lambda *_: iter([row]))
    (record,) = find(name)[0].records("test", None)
    assert record.about["instruction"] == instruction and record.answer == answer


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"cannot load the data set 'google/boolq' from the hub; give --data_dir"):
        find("boolq")[0].records("test", None)


# ---- the real slices -------------------------------------------------------------------------------------------------

REAL = {
    "boolq": ("llm_adapters", 3270), "piqa": ("llm_adapters", 1838), "social_i_qa": ("llm_adapters", 1954),
    "ARC-Easy": ("llm_adapters", 2376), "openbookqa": ("llm_adapters", 500), "AQuA": ("llm_adapters", 254),
    "MultiArith": ("llm_adapters", 600), "mawps": ("llm_adapters", 238), "AddSub": ("llm_adapters", 395),
    "SingleEq": ("llm_adapters", 508), "gsm8k": ("", 1319), "alpaca": ("alpaca", 805), "sst2": ("glue", 872),
    "cola": ("glue", 1043), "mrpc": ("glue", 408), "banking77": ("", 3080),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_real_test_sets(name, shared):
    folder, count = REAL[name]
    (task,) = find(name)
    records = task.records("test", shared / "data" / folder)
    assert len(records) == count
    if name in ("boolq", "piqa", "social_i_qa", "ARC-Easy", "openbookqa", "mawps"):
        assert all(task.same(task.answer_of(record.completion), record.answer) for record in records)


def test_the_leaks_that_are_known(shared):
    folder = shared / "data" / "llm_adapters"
    assert [training_records(name, folder)[1] for name in ("ARC-Easy", "mawps", "boolq")] == [2, 25, 0]


def test_the_majorities_that_are_known(shared):
    folder = shared / "data"
    for name, place, share in (("boolq", "llm_adapters", 62.2), ("sst2", "glue", 50.9), ("cola", "glue", 69.1)):
        answers = Counter(record.answer for record in find(name)[0].records("test", folder / place))
        assert 100 * max(answers.values()) / sum(answers.values()) == pytest.approx(share, abs=0.05)
