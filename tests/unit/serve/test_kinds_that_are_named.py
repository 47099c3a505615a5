"""A task that is named is asked, or the question is refused: none is passed over."""

from itertools import combinations

import pytest

from restuning._errors import DataError
from restuning.serve import Service
from serving import picture, save_all_kinds

KINDS = {"t0": "image", "mood": "text", "words": "audio"}
"""Of inputs that each task answers here."""

QUESTIONS = {"image": [picture()], "text": ["a good film"]}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    tasks = save_all_kinds(tmp_path_factory.mktemp("tasks"))
    made = Service({name: tasks[name] for name in KINDS})
    # As if it answered sounds: it is never asked.
    made.entries["words"].batcher.inputs.kind = "audio"
    yield made
    made.entries["words"].batcher.inputs.kind = "words"
    assert made.drain(60)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_task_that_is_named_answers_or_is_refused(service, count):
    for named in combinations(KINDS, count):
        for given in (["image"], ["text"], ["image", "text"]):
            asked = {kind: QUESTIONS[kind] for kind in given}
            if {KINDS[name] for name in named} == {*given}:
                replies = service.ask_several(asked, named)
                told = {n for each in replies for f in each for n in f.result(60).versions}
                assert told == {*named}
            else:
                with pytest.raises(DataError, match="kind"):
                    service.ask_several(asked, named)
