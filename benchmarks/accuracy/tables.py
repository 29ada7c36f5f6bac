"""Tables as people have them: CSV in the usual encodings and delimiters, and Excel workbooks -> lines of text."""

import csv
import io
from collections.abc import Hashable, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from benchmarks.accuracy.dataset import MalformedData, Origin, counted, listed, named

OPENPYXL = Origin("`pip install openpyxl`", "MIT")
WORKBOOK_SUFFIXES = (".xlsm", ".xlsx")
ZIP_MARK = b"PK\x03\x04"  # which a workbook begins with
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

Line = tuple[int, list[str]]  # its number in the file, and its cells without the blanks around them


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a table with a header that has these columns, every cell as text, an absent one as ''.

    Raises:
        MalformedData: it is damaged, lacks a column, or has no lines.
    """
    header, *lines = read_lines(path) or [(1, [])]
    _check_columns(path, header[1], columns)
    for number, cells in lines:
        if any(cells[len(header[1]) :]):
            raise MalformedData(
                f"{path}: line {number} has {len(cells)} cells, and the header {len(header[1])} columns: {cells}"
            )
    rows = [dict(zip(header[1], cells + [""] * len(header[1]), strict=False)) for _, cells in lines]
    if not rows:
        raise MalformedData(f"{path}: no lines after the header")
    return rows


def _check_columns(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    if absent := [column for column in columns if column not in header]:
        raise MalformedData(f"{path}: no column {absent[0]!r} in the header {list(header)}")
    if twice := [column for column in columns if header.count(column) > 1]:
        raise MalformedData(f"{path}: the column {twice[0]!r} is there twice")


def read_lines(path: Path) -> list[Line]:
    """The lines that are not blank."""
    lines = _read_workbook(path) if path.suffix.lower() in WORKBOOK_SUFFIXES else _read_csv(path)
    stripped = [(number, [cell.strip() for cell in cells]) for number, cells in lines]
    return [(number, cells) for number, cells in stripped if any(cells)]


def _read_csv(path: Path) -> list[Line]:
    text = text_of(path)
    file = io.StringIO(text, newline="")
    # strict: of a quotation mark that nothing closes, all that follows would become one cell.
    reader = csv.reader(file, delimiter=_delimiter(text), strict=True)
    try:
        return [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise MalformedData(f"{path}: line {reader.line_num}: {error}") from error


def _delimiter(text: str) -> str:
    """What is between the cells: tabs as in Dataverse's ``.tab``, semicolons as of a German Excel, or commas."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    if "\t" in header:
        return "\t"
    return ";" if header.count(";") > header.count(",") else ","


def text_of(path: Path) -> str:
    """A text in UTF-8 or UTF-16, with or without a byte order mark, or in what Windows wrote before.

    Raises:
        MalformedData: it is not text, or cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MalformedData(f"{path}: {error.strerror}") from error
    if content.startswith(ZIP_MARK):
        raise MalformedData(f"{path}: a workbook or archive, not text: save it as CSV, or name it .xlsx")
    encoding = _encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise MalformedData(f"{path}: cut off or damaged: {error.reason} in {encoding}") from error
    if "\0" in text:
        raise MalformedData(f"{path}: not text, or damaged: it has zero bytes")
    return text


def _encoding(content: bytes) -> str:
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return encoding
    if content[1:2] == b"\0" or content[:1] == b"\0":  # every table begins with a letter of the alphabet
        return "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    try:
        content.decode()
    except UnicodeDecodeError:
        # A wrong guess shows: names of files with such letters are not found then.
        return "cp1252" if _is_windows(content) else "latin-1"
    return "utf-8"


def _is_windows(content: bytes) -> bool:
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return False
    return True


def _read_workbook(path: Path) -> list[Line]:
    """The first sheet of a workbook."""
    if find_spec("openpyxl") is None:
        raise OPENPYXL.missing(f"the package openpyxl, which reads {path}")
    from openpyxl import load_workbook  # few tables are workbooks

    try:
        with closing(load_workbook(path, read_only=True, data_only=True)) as workbook:
            sheet = workbook.worksheets[0]
            sheet.reset_dimensions()  # some programs write none, or that of the first cell alone
            lines = [list(cells) for cells in sheet.iter_rows(values_only=True)]
    except Exception as error:  # zip, XML and openpyxl raise a dozen kinds
        raise MalformedData(f"{path}: not a whole workbook (.xlsx): {error or type(error).__name__}") from error
    return [(i + 1, ["" if cell is None else str(cell) for cell in cells]) for i, cells in enumerate(lines)]


def each_once(
    table: Path, images: Sequence[str], facts: Sequence[Hashable], what: str
) -> tuple[list[int], tuple[str, ...]]:
    """The first line of each image, by index, and what is to be said of others that only repeat them.

    Raises:
        MalformedData: lines of an image have different facts.
    """
    first: dict[str, int] = {}
    repeated: dict[str, set[Hashable]] = {}
    for i, image in enumerate(images):
        if first.setdefault(image, i) != i:
            repeated.setdefault(image, {facts[first[image]]}).add(facts[i])
    if wrong := {image: said for image, said in repeated.items() if len(said) > 1}:
        reasons = [f"{image}: {named(map(_words, sorted(said, key=str)))}" for image, said in wrong.items()]
        raise MalformedData(
            f"{table}: {counted(len(wrong), 'image')} listed with more than one {what}:\n{listed(reasons)}"
        )
    n_repeated = len(images) - len(first)
    notice = f"Note: {table}: {counted(n_repeated, 'line')} left out, which repeat others: {named(repeated)}"
    return list(first.values()), (notice,) if n_repeated else ()


def _words(fact: Hashable) -> str:
    return " of ".join(repr(word) for word in fact) if isinstance(fact, tuple) else repr(fact)
