"""The table of errors of 4-bit types agrees with theory, and its storage with the formats."""

import json

import pytest

from tools.bench import quantisation_error


@pytest.fixture(scope="module")
def rows():
    return quantisation_error.rows(1024, seed=3, blocks=(32, 64))


def test_measured_errors_agree_with_theory(rows):
    assert len(rows) == 12
    for row in rows:
        assert row.error == pytest.approx(row.theory, rel=0.01), row


def test_known_numbers(rows):
    found = {(row.type, row.block_size): row for row in rows}
    nf4 = found["NF4", 64]
    assert nf4.error == pytest.approx(0.092, abs=0.001)
    assert nf4.theory == pytest.approx(0.0920, abs=0.0002)
    assert nf4.searched <= 0.0855
    assert (f"{nf4.bits:.4f}", f"{nf4.bits_double:.4f}") == ("4.5000", "4.1270")
    at_64 = [found[name, 64].error for name in ("NF4", "E2M1", "Int4 symmetric", "FP4 (bitsandbytes)", "E3M0")]
    assert at_64 == sorted(at_64)


def test_the_command_prints_the_table_and_writes_the_numbers(tmp_path, monkeypatch, capsys):
    file = tmp_path / "numbers.json"
    monkeypatch.setattr("sys.argv", ["quantisation_error.py", "--size", "64", "--json", str(file)])
    quantisation_error.main()
    printed = capsys.readouterr().out
    assert printed.startswith("| type | block | relative RMSE | theory |")
    assert len(printed.splitlines()) == 26
    assert len(json.loads(file.read_text())["rows"]) == 24
