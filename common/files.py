"""Files: JSON lines in and out, hashes, the disk, and errors that say where they come from."""

import hashlib
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":  # which has no fcntl and no resource
    sys.exit("EPRLI needs Linux or macOS; on Windows, run it in WSL")


class Stop(Exception):
    """The run cannot go on. The message says why, and what to do."""


@contextmanager
def explained(words):
    """Turn any error inside the block into a ValueError that begins with `words`: libraries raise
    errors of all kinds, and a user's own code may exit."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{words} ({type(error).__name__}: {error})") from error


def read_records(path, parse=lambda record, name: record, rows=slice(None)):
    """JSON lines of one file, each through parse(record, default id); errors name file and line.

    rows  which of the lines that are not blank; the default id tells the line, whatever the slice
    """
    path, records = Path(path), []
    hub = "a data set of the hub is OWNER/NAME[:CONFIGURATION]:SPLIT, a slice F.jsonl[:512]"
    with explained(f"{path}: cannot be read as UTF-8 text; {hub}"):
        # str.splitlines would also cut at U+2028, which is legal within a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if numbered and numbered[0][1].startswith("["):
        raise ValueError(f"{path}: a JSON array; one object a line is read (jq -c '.[]' FILE)")
    for number, line in numbered[rows]:
        try:
            record = json.loads(line)
            if re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
                raise ValueError("half a character (a lone surrogate, \\ud800 to \\udfff)")
            records.append(parse(record, f"{path.stem}-{number}"))
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not numbered:
        raise ValueError(f"{path}: nothing in it")
    return records


def write_records(path, records, mode="w"):
    """JSON lines, as read_records reads them back.  mode  of `open`"""
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def source_of(name):
    """F.jsonl[:512] -> F.jsonl. A path that exists is no slice, whatever its name."""
    found = re.fullmatch(r"(.+)\[.*:.*\]", str(name))
    return found[1] if found and not Path(name).exists() else name


def stem(name):
    """What results call a file or data set: without folder, ending and slice"""
    path = Path(source_of(name))
    hub = ":" in path.name and not path.exists()  # OWNER/NAME-1.5:SPLIT
    return path.name if hub else path.stem


def stems(flag, paths):
    """`stem` of each path. Raises ValueError if two are equal."""
    names = [stem(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{flag}: results are known by the names of files, without folder, ending and slice, "
            "and one stands twice"
        )
    return names


def squash(text):
    return " ".join(text.split())


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def force_to_disk(*paths):
    """Force files and folders to the disk, so that their data arrive before one is renamed."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
