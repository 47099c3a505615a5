"""The OpenAPI file of the docs is what the server says of itself."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "write_openapi.py"


@pytest.fixture(scope="module")
def written():
    names = runpy.run_path(str(SCRIPT))
    return json.loads(names["FILE"].read_text()), json.loads(json.dumps(names["describe_server"]()))


def test_the_openapi_file_is_that_of_the_server(written):
    file, server = written
    if file["x-written-by"] != server["x-written-by"]:
        pytest.skip(f"written by {file['x-written-by']}, and this is {server['x-written-by']}")
    assert file == server, f"run python {SCRIPT.name}"


def test_every_address_of_the_server_is_in_the_openapi_file(written):
    file, server = written
    assert {(p, m) for p, of in file["paths"].items() for m in of} == {
        (p, m) for p, of in server["paths"].items() for m in of
    }
    for path, methods in server["paths"].items():
        for method, told in methods.items():
            assert told["description"], f"{method} {path}"
