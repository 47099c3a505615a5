"""Write `docs/openapi.json`, what the server takes and gives: `python docs/write_openapi.py`."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from restuning import serve

FILE = Path(__file__).parent / "openapi.json"


def describe_server() -> dict[str, Any]:
    """The OpenAPI of a server; one of another FastAPI may say the same in other words."""
    return {**serve.app().openapi(), "x-written-by": f"fastapi {version('fastapi')}"}


if __name__ == "__main__":
    FILE.write_text(json.dumps(describe_server(), indent=1) + "\n", encoding="utf-8")
