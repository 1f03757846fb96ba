"""Which reader a path is for. A results folder is not read here: that takes the store."""

from collections.abc import Mapping
from pathlib import Path

from loratune.analyse.audit.from_csv import read_csv
from loratune.analyse.audit.from_peft import read_peft
from loratune.analyse.audit.rows import AuditTable
from loratune.errors import DataError

# Reading one can run code.
_PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"})


def read_table(path: Path, *, columns: Mapping[str, str]) -> AuditTable:
    """A CSV, one PEFT result file, or a folder of them.

    Raises:
        DataError: nothing there, nothing that can be read, or a map for something that is no CSV.
    """
    try:
        if path.is_dir():
            _refuse_map(path, columns)
            files = sorted(path.glob("*.json"))
            if not files:
                raise DataError(
                    f"{path} holds neither a study.yaml (a results folder) nor *.json files (PEFT "
                    "method_comparison results); give a CSV to audit anything else"
                )
            return read_peft(files)
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; expected a results folder, a CSV, or a folder "
                "of PEFT method_comparison results"
            )
        if path.suffix.lower() in _PICKLES:
            raise DataError(
                f"{path} is a pickle by its name, which can run code when it is read; export it "
                "as CSV"
            )
        if path.suffix.lower() == ".json":
            _refuse_map(path, columns)
            return read_peft([path])
        return read_csv(path, columns=columns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _refuse_map(path: Path, columns: Mapping[str, str]) -> None:
    if columns:
        raise DataError(f"--map names columns of a CSV, and {path} is none; leave it out")
