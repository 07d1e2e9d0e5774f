"""JSON that goes out."""

import json


def json_bytes(value: object) -> bytes:
    """Short, in UTF-8; an unpaired surrogate, which a client may have sent, becomes a `?`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace")
