"""PEFT's own tests of LoRA, run over this library in PEFT's place, come out as the committed table says."""

import json

import pytest
from run_peft import TABLE, NoSource, count, installed, other_files, run, unpack

pytest.importorskip("peft")

COMMITTED = json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    if installed() != COMMITTED["peft"]:
        pytest.skip(f"the table is of peft {COMMITTED['peft']}, installed is {installed()}")
    try:
        return unpack(tmp_path_factory.mktemp("peft"))
    except NoSource as error:
        pytest.skip(str(error))


@pytest.mark.longer
@pytest.mark.timeout(1800)
def test_every_case_of_pefts_tests_comes_out_as_the_table_says(source):
    outcomes = run(source)
    failed = {name: why[-400:] for name, (outcome, why) in outcomes.items() if outcome == "failed"}
    assert failed == {}
    assert count(outcomes) == COMMITTED["tests"]


@pytest.mark.longer
def test_every_file_of_pefts_tests_is_run_or_has_a_reason(source):
    assert other_files(source) == COMMITTED["files"]
