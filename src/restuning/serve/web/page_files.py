"""The page at `/` and what it is made of: files of the package, nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent / "page"


@router.get("/")
async def page() -> FileResponse:
    """The page."""
    return FileResponse(FOLDER / "index.html")


@router.get("/docs")
async def docs() -> FileResponse:
    """The OpenAPI file as a page."""
    return FileResponse(FOLDER / "docs.html")


@router.get("/page/{name}")
async def part(name: str) -> FileResponse:
    """Styles and scripts."""
    # Compared with what is there: a name is no path.
    known = {file.name: file for file in FOLDER.iterdir() if file.suffix in (".css", ".js")}
    if name not in known:
        raise HTTPException(404, "no such part of the page")
    return FileResponse(known[name])
