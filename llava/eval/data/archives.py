"""Published files put in their place, out of a folder or an archive that the user downloaded."""

import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath

from llava.eval.data.layout import Layout
from llava.eval.tasks.base import TaskError

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class Store:
    """Files of a folder or an archive: `read(name)` gives the bytes of one of `names`."""

    names: tuple[str, ...]
    read: Callable[[str], bytes]

    def find(self, wanted: str, parts: int = 1) -> str | None:
        """Return the stored file that `wanted` (a path below the data root) is, or None.

        Its last `parts` names are those of `wanted`. Of several it is the one that shares most
        folders with `wanted`, counted from the file upwards; the first such one.
        """
        path = PurePosixPath(wanted)
        named = self._by_name.get(path.name, ())
        shared = {name: _shared(PurePosixPath(name), path) for name in named}
        best = max(shared, key=shared.__getitem__, default=None)
        return best if best is not None and shared[best] >= parts else None

    def below(self, folder: str) -> Iterator[tuple[str, str]]:
        """Yield (stored name, path below `folder`) of everything in a folder of this name."""
        for name in self.names:
            _, mark, rest = f"/{name}".partition(f"/{folder}/")
            if mark:
                yield name, rest

    @cached_property
    def _by_name(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            found[PurePosixPath(name).name].append(name)
        return found


@contextmanager
def open_store(path: Path) -> Iterator[Store]:
    """Open a folder, a .zip or a .tar (also compressed).

    Raises:
        TaskError: it is anything else.
    """
    try:
        if path.is_dir():
            found = (file for file in sorted(path.rglob("*")) if file.is_file())
            names = tuple(file.relative_to(path).as_posix() for file in found)
            yield Store(names, lambda name: (path / name).read_bytes())
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                files = (entry.filename for entry in archive.infolist() if not entry.is_dir())
                yield Store(tuple(files), archive.read)
        elif path.is_file() and tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                members = {entry.name: entry for entry in tar.getmembers() if entry.isfile()}
                yield Store(tuple(members), lambda name: _extract(tar, members[name]))
        elif path.is_file() and path.suffix in ARCHIVES:
            raise TaskError(
                f"{path} is damaged or cut short, it is not an archive; download it again"
            )
        elif path.is_file():
            yield Store((path.name,), lambda _: path.read_bytes())
        else:
            raise TaskError(f"cannot read {path}: no such file or folder; check the path of --from")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise TaskError(f"{path} is damaged or cut short ({error}); download it again") from error


def take_files(store: Store, files: Iterable[Path], tree: Path | None, layout: Layout) -> int:
    """Put what `store` has of `files` and `tree` below the data root; return how many."""
    found = {
        path: source
        for path in files
        if (source := store.find(path.relative_to(layout.root).as_posix())) is not None
    }
    if tree is not None:
        found |= {tree / rest: source for source, rest in store.below(tree.name)}
    for target, source in found.items():
        layout.write(target, store.read(source))
    return len(found)


def take_images(store: Store, folder: Path, names: Iterable[str], layout: Layout) -> int:
    """Put those images of `folder` that `store` has below the data root; return how many."""
    count = 0
    for name in names:
        # all of the name must fit: ScienceQA calls every image image.png
        wanted = (folder / name).relative_to(layout.root).as_posix()
        source = store.find(wanted, parts=len(PurePosixPath(name).parts))
        if source is not None:
            layout.write(folder / name, store.read(source))
            count += 1
    return count


def _shared(one: PurePosixPath, other: PurePosixPath) -> int:
    """Count the parts that the two have in common at their ends."""
    pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    handle = tar.extractfile(member)
    assert handle is not None, "only files are listed"
    with handle:
        return handle.read()
