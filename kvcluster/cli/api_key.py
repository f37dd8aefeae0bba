"""Where a command takes its API key from: a file or a variable, never the command line, which every
user of the machine can read.
"""

import os
from pathlib import Path

from kvcluster.config_sources import API_KEY_VARIABLE
from kvcluster.errors import InvalidField

API_KEY_HELP = f"File with the API key. Default: the variable {API_KEY_VARIABLE}, else none."


def api_key_from(file: Path | None) -> str | None:
    """Raises: InvalidField."""
    if file is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise InvalidField("--api-key-file", f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidField("--api-key-file", f"{file} has no API key") from error
    if not text or len(text.split()) != 1:
        raise InvalidField("--api-key-file", f"{file} has no API key")
    return text
