import gzip
import json
import time

import pytest

from lorauter.errors import TaskError
from lorauter.tasks import Example, Task, read_task, read_tasks

ROW = {"input": "is it good?", "target": "yes"}
TASK = {"name": "sst2", "domain": "sentiment", "metric": "em", "validation": [ROW]}


def test_a_task_is_read_and_written_again() -> None:
    data = {**TASK, "description": "Sentiment.", "test": [ROW, ROW], "source": "an unknown key is left alone"}
    task = Task.from_json(data, source="x")
    example = Example("is it good?", "yes")
    assert task == Task("sst2", "sentiment", "em", (example,), (example, example), "Sentiment.")
    assert Task.from_json(json.loads(json.dumps(task.to_json())), source="x") == task


def test_description_and_test_may_be_left_out() -> None:
    task = Task.from_json(TASK, source="x")
    assert (task.description, task.test) == ("", ())


@pytest.mark.parametrize(
    ("target", "answers"),
    [
        ("yes", ("no", "yes")),
        ('{"sum": 3}', {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}),
    ],
)
def test_a_task_may_know_its_answers(target, answers) -> None:
    given = {**TASK, "validation": [{"input": "1 + 2", "target": target}], "answers": answers}
    task = Task.from_json(json.loads(json.dumps(given)), source="x")
    assert task.answers == answers
    assert Task.from_json(json.loads(json.dumps(task.to_json())), source="x") == task
    assert len({task, task}) == 1


def test_a_task_that_knows_none_is_written_as_ever() -> None:
    assert "answers" not in Task.from_json({**TASK, "answers": None}, source="x").to_json()


def test_a_target_that_is_not_of_the_schema_is_told() -> None:
    answers = {"type": "object", "required": ["sum"]}
    given = {**TASK, "validation": [{"input": "1 + 2", "target": "{}"}], "answers": answers}
    with pytest.raises(
        TaskError, match=r"validation\[0\]\.target is not of the schema in answers: 'sum' is a required"
    ):
        Task.from_json(given, source="x")


def test_many_answers_take_no_time() -> None:
    answers = [str(i) for i in range(100_000)]
    used = time.process_time()
    with pytest.raises(TaskError, match="answers has '99999' twice"):
        Task.from_json({**TASK, "answers": [*answers, answers[-1]]}, source="x")
    rows = [{"input": "which?", "target": answers[-1]}] * 10_000
    assert Task.from_json({**TASK, "validation": rows, "answers": answers}, source="x").answers == tuple(answers)
    assert time.process_time() - used < 3


@pytest.mark.parametrize("key", ["name", "domain", "metric", "validation"])
def test_a_missing_key_is_named(key) -> None:
    with pytest.raises(TaskError, match=rf"here\.json: missing {key}$") as caught:
        Task.from_json({k: v for k, v in TASK.items() if k != key}, source="here.json")
    assert caught.value.source == "here.json"


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "-x", "x" * 129, "ä", "a\n", 7, None, ["a"]])
def test_a_name_that_could_not_be_a_path_or_header_is_refused(name) -> None:
    with pytest.raises(TaskError, match=r"name .* is not allowed"):
        Task.from_json({**TASK, "name": name}, source="x")


@pytest.mark.parametrize("name", ["a", "7b", "flan-v2_q.a", "x" * 128])
def test_a_plain_name_is_taken(name) -> None:
    assert Task.from_json({**TASK, "name": name}, source="x").name == name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": "yes"}, "answers must be a list of texts, or a JSON schema, got str"),
        ({"answers": True}, "answers must be a list of texts, or a JSON schema, got bool"),
        ({"answers": []}, "answers is empty"),
        ({"answers": ["yes", 1]}, r"answers\[1\] must be a text that is not empty, got 1"),
        ({"answers": ["yes", " "]}, r"answers\[1\] must be a text that is not empty"),
        ({"answers": ["yes", "\ud800"]}, r"answers\[1\] must be a text"),
        ({"answers": ["yes", "no", "yes"]}, "answers has 'yes' twice"),
        ({"answers": ["Yes", "no"]}, r"validation\[0\]\.target is 'yes', which is none of the answers"),
        ({"answers": {"type": "object"}}, r"validation\[0\]\.target is no JSON, and answers is a schema"),
        ({"answers": {"type": "nonsense"}}, "answers cannot be compiled"),
        ({"answers": {"properties": {"a": {"pattern": "("}}}}, r"answers at properties\.a cannot be compiled"),
        ({"answers": {"$ref": "http://127.0.0.1:1/x"}}, "answers cannot be compiled"),
        ({"domain": 3}, "domain must be a string, got 3"),
        ({"domain": "\ud800"}, "domain holds half a character"),
        ({"description": None}, "description must be a string"),
        ({"metric": "f1"}, "metric 'f1' is not one of em, rouge, bleu"),
        ({"metric": ["em"]}, "is not one of"),
        ({"validation": []}, "validation is empty"),
        ({"validation": "text"}, "validation must be a list of examples, got str"),
        ({"validation": {"input": "a", "target": "b"}}, "validation must be a list of examples, got dict"),
        ({"validation": [ROW, "text"]}, r"validation\[1\] must be an object"),
        ({"validation": [{"input": "a"}]}, r"validation\[0\] must be an object with strings"),
        ({"validation": [{"input": "a", "target": 1}]}, r"validation\[0\] must be an object with strings"),
        ({"validation": [{"input": " \n", "target": "b"}]}, r"validation\[0\]\.input is empty"),
        ({"validation": [{"input": "half \ud83d", "target": "b"}]}, r"validation\[0\] holds half a character"),
        ({"validation": [{"input": "a", "target": "\udc00"}]}, r"validation\[0\] holds half a character"),
        ({"test": [{"input": "a"}]}, r"test\[0\] must be"),
        ({"test": None}, "test must be a list"),
    ],
)
def test_a_wrong_value_is_named(change, said) -> None:
    with pytest.raises(TaskError, match=said):
        Task.from_json({**TASK, **change}, source="x")


@pytest.mark.parametrize("data", [[], "task", 3, None])
def test_a_task_is_an_object(data) -> None:
    with pytest.raises(TaskError, match="a task is a JSON object"):
        Task.from_json(data, source="x")


def test_an_empty_target_is_an_answer() -> None:
    row = {"input": "say nothing", "target": ""}
    assert Task.from_json({**TASK, "validation": [row]}, source="x").validation[0].target == ""


def test_a_folder_is_read_in_the_order_of_names_whatever_the_files_are_called(tmp_path) -> None:
    (tmp_path / "1.json").write_text(json.dumps({**TASK, "name": "wic"}))
    (tmp_path / "2.json.gz").write_bytes(gzip.compress(json.dumps({**TASK, "name": "agnews"}).encode()))
    (tmp_path / "README.md").write_text("not a task")
    (tmp_path / "folder.json").mkdir()
    assert [task.name for task in read_tasks(tmp_path)] == ["agnews", "wic"]


def test_two_files_may_not_define_one_task(tmp_path) -> None:
    for file in ("a.json", "b.json"):
        (tmp_path / file).write_text(json.dumps(TASK))
    with pytest.raises(TaskError, match=r"b\.json: task 'sst2' is already defined"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("broken.json", b'{"name": '),
        ("latin1.json", '{"name": "ä"}'.encode("latin-1")),
        ("deep.json", b"[" * 100_000),
        ("notgzip.json.gz", b'{"name": "x"}'),
        ("cut.json.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9]),
        ("flipped.json.gz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 40),
        ("missing.json", None),
    ],
)
def test_a_file_that_is_no_json_is_named(tmp_path, file, content) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(TaskError, match=rf"{file}: cannot be read as JSON"):
        read_task(tmp_path / file)


def test_a_folder_without_tasks_is_refused(tmp_path) -> None:
    with pytest.raises(TaskError, match=r"holds no \.json"):
        read_tasks(tmp_path)
    with pytest.raises(TaskError, match="is not a directory"):
        read_tasks(tmp_path / "missing")
