"""What the tests of data share."""

import pytest

from restuning import load_backbone


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    """A small BERT with its tokenizer, as the backbone of a text task."""
    # Imported here: most files need no model library, which takes seconds.
    from zoo import folders

    return load_backbone(f"hf:{folders.bert(tmp_path_factory.mktemp('bert'))}")
