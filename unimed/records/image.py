"""Opening the image that a record names. What is done to its file, and where its pixels lie there, come with it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unimed.errors import UserError
from unimed.io import inside, sha256
from unimed.records.box import AS_STORED, Placement
from unimed.records.files import whole_image
from unimed.records.pixels import Opened, View, open_view
from unimed.records.policy import BadRecord
from unimed.records.record import ImageRef, split_root

__all__ = ["Images", "Opened", "Seen", "open_image"]

MOST_SEEN = 1 << 16  # about 100 MB


def view(ref: ImageRef, path: Path) -> View:
    """The part of the file at `path` that a reference names."""
    return View(path, ref.plane or "axial", ref.frame if ref.slice is None else ref.slice, ref.window)


def open_image(ref: ImageRef, folder: Path = Path(), roots: dict[str, str] | None = None) -> Opened:
    """The image of a reference, relative to the data set's folder or under one of its roots."""
    return open_view(view(ref, Images(folder, roots or {}).path(ref)))


class Seen(NamedTuple):
    """An image that was looked at. image: for `load_image`. size: as shown. placement: of the shown pixels in the file."""

    image: Path | View | np.ndarray
    size: tuple[int, int]
    placement: Placement


class Images:
    """The images of one data set. Each is looked at once, or again after MOST_SEEN others: is it there and readable, and its size.

    arrays: [N, H, W] or [N, H, W, 3] of an archive that a reader has opened, by the path that its references have; their frame is N.
    """

    def __init__(self, folder: Path, roots: dict[str, str], links: bool = True) -> None:
        self.folder, self.roots, self.links = folder, roots, links
        self.arrays: dict[str, np.ndarray] = {}
        self._seen: dict[ImageRef, Seen | BadRecord] = {}
        self._hashes: dict[Path, str] = {}
        self.outside: dict[str, bool] = {}  # folders under other roots where images were looked for; True: all of it is an image

    def path(self, ref: ImageRef) -> Path:
        """The file of an image, which need not be there."""
        root, name = split_root(ref.path)
        if root and root not in self.roots:
            known = ", ".join(self.roots) or "none"
            raise BadRecord("with an unknown root", f"path {ref.path!r}: dataset.json has no root {root!r} (it has {known})")
        try:
            path = inside(self.folder / self.roots[root] if root else self.folder, name, self.links)
        except UserError as error:
            raise BadRecord("with a file name that is not allowed", str(error)) from None
        if root:
            whole = os.path.isdir(path)
            self.outside[str(path if whole else path.parent)] = whole
        return path

    def look(self, ref: ImageRef, where: str) -> Seen:
        """Path or view, size and placement of an image; a BadRecord where it cannot be used."""
        if ref.path in self.arrays:
            pixels = self.arrays[ref.path][ref.frame or 0]
            return Seen(pixels, (pixels.shape[1], pixels.shape[0]), AS_STORED)
        found = self._seen.get(ref)
        if found is None:
            try:
                path = self.path(ref)
                whole = ref.plane is ref.slice is ref.window is ref.frame is None and not os.path.isdir(path)
                image = path if whole else view(ref, path)
                found = Seen(image, *whole_image(image))
            except BadRecord as error:
                found = error
            if len(self._seen) >= MOST_SEEN:
                self._seen.clear()
            self._seen[ref] = found
        if isinstance(found, BadRecord):
            raise BadRecord(found.kind, f"{where}: {found}")
        return found

    def hash(self, ref: ImageRef) -> str:
        """sha256 of the image's file, or of all files of a series: two slices of one volume have the same."""
        if ref.path in self.arrays:
            return hashlib.sha256(self.arrays[ref.path][ref.frame or 0].tobytes()).hexdigest()
        path = self.path(ref)
        if path not in self._hashes:
            try:
                files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
                digests = [sha256(file) for file in files]
            except OSError as error:
                raise BadRecord("with a missing image", f"{path}: no such image ({error.strerror})") from None
            self._hashes[path] = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return self._hashes[path]
