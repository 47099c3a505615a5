"""Errors say when they are raised, and cross process borders whole."""

import inspect
import pickle

import pytest

from restuning import _errors
from restuning._errors import DivergedError, RestuningError, TrainingError

CLASSES = [
    cls
    for _, cls in inspect.getmembers(_errors, inspect.isclass)
    if issubclass(cls, RestuningError) and cls is not RestuningError
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_says_when_it_is_raised_and_survives_pickling(cls):
    assert cls.__doc__.startswith("Raised ")
    error = cls("it broke", where="here", found="nothing", fix="mend it")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (written a moment ago)
    assert type(again) is cls and str(again) == str(error)
    assert (again.what, again.where, again.found, again.fix) == (
        "it broke",
        "here",
        "nothing",
        "mend it",
    )


def test_what_diverged_is_known_by_its_class_and_is_still_an_error_of_training():
    assert issubclass(DivergedError, TrainingError)
