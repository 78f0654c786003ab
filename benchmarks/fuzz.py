# SPDX-License-Identifier: Apache-2.0
"""
Whether changed files are refused, in one line, soon, and with little memory.

    python benchmarks/fuzz.py --count 10000 --seed 0
    python benchmarks/fuzz.py --minutes 60 --seed 7 --only resume-state recipe
    python benchmarks/fuzz.py --case 1234 --keep FOLDER     # one again, in all detail

Small real files of every kind are made, and for each case one of them is changed: bits,
lengths, headers, JSON and YAML, other files and things that are no files in its place. A
command, or the function behind it, then reads it in another process. A case fails if what
is read is not what was written and nobody says so; if it computes or waits for more than
10 s; if it takes more memory than twice the files and 256 MB, or 2 GB more of addresses; if
code of the files is run; if something is left behind; or if what is said is a traceback, or
names no file.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fuzz_changes  # noqa: E402 - after the environment is set
import fuzz_forgery  # noqa: E402
from fuzz_readers import CHECKSUMMED, READERS, Digests  # noqa: E402
from fuzz_subjects import CHECKPOINTS, OURS, Subject, make_subjects, text  # noqa: E402
from fuzz_worker import Worker  # noqa: E402

WITHOUT = ("adapter_model.safetensors", "adapter_config.json", "README.md")
"""Files of adapters, to which PEFT gives no checksums."""


@dataclass(frozen=True)
class Result:
    """
    How a case ended.

    :param failures: what must not be; empty if all is well
    :param megabytes: of memory, beside what was there before
    """

    case: int
    subject: str
    reader: str
    change: str
    failures: tuple[str, ...]
    status: int
    seconds: float
    megabytes: float
    said: str = ""
    error: str = ""


class Fuzz:
    """Subjects in a folder, and what reads them."""

    def __init__(
        self, folder: Path, names: list[str], seed: int, subjects: Path | None = None
    ) -> None:
        self.folder, self.seed = folder, seed
        self.mark = folder / "mark"
        subjects = (subjects or folder / "subjects").resolve()
        self.subjects = make_subjects(subjects, names)
        self.work = folder / "work"
        self.work.mkdir()
        (self.work / "dense").symlink_to(subjects / "dense-model")
        (self.work / "text.txt").write_text(text(20))
        recipe = OURS.format(fields=json.dumps({"method": "identity"}))
        (self.work / "search.yaml").write_text(recipe)
        trap = folder / "trap"
        trap.mkdir()
        code = f"import os\nos.mkdir({str(self.mark)!r})\n"
        (trap / f"{fuzz_changes.TRAP}.py").write_text(code)
        sys.path.append(str(trap))
        self.worker = Worker()
        self.right: dict[tuple[str, str], Digests | None] = {}
        for subject in self.subjects:
            for reader in dict.fromkeys(subject.readers):
                self.right[subject.name, reader] = self._unchanged(subject, reader)

    def _unchanged(self, subject: Subject, reader: str) -> Digests | None:
        """What a reader makes of a subject that is as it should be."""
        there, scratch = self._place("right", subject)
        read = READERS[reader](there, scratch)
        shutil.rmtree(there.parent)
        if read.status or read.error or read.left:
            said = f"{read.error}{read.said}"[-2000:]
            raise AssertionError(f"{subject.name}, {reader}: {read.left} {said}")
        return read.made

    def _place(self, name: str, subject: Subject) -> tuple[Path, Path]:
        there, scratch = self.work / name / subject.name, self.work / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(there.parent, ignore_errors=True)
        scratch.mkdir(parents=True)
        fuzz_changes.copy(subject.folder, there)
        return there, scratch

    def run(self, case: int, keep: Path | None = None) -> Result:
        """Change a subject, have it read, and judge."""
        rng = Random(f"{self.seed} {case}")
        subject = self.subjects[case % len(self.subjects)]
        readers = [r for r in subject.readers if r != "prune" or rng.random() < 0.2]
        reader = rng.choice(readers)
        there, scratch = self._place("case", subject)
        files = list(_files(there, subject.changed))
        said = fuzz_changes.change(there, files, rng, self.mark)
        forged = rng.random() < 0.25 and fuzz_forgery.forge(there)
        if keep is not None:
            fuzz_changes.copy(there, keep)
        ended = self.worker.read(there, scratch, reader, _size(there))
        failures = list(ended.pop("failures"))
        made, right = ended.pop("made"), self.right[subject.name, reader]
        left = ended.pop("left")
        if reader in CHECKSUMMED and made is not None and not forged:
            covered = not any(name in said for name in WITHOUT)
            sums = there / fuzz_forgery.CHECKSUMS  # without them verify says so
            covered &= os.path.lexists(sums) or subject.name not in CHECKPOINTS
            if made != right and covered:
                failures.append("silently wrong")
        if left:
            failures.append(f"left behind: {', '.join(left)}")
        if self.mark.exists():
            self.mark.rmdir()
            failures.append("code was run")
        if ended["status"] and not failures:
            failures += _unclear(ended["said"], subject.folder, there)
        said += " (forged)" * forged
        result = Result(case, subject.name, reader, said, tuple(failures), **ended)
        shutil.rmtree(there.parent, ignore_errors=True)
        return result if failures else replace(result, said=result.said[:300])


def _now() -> float:
    return time.monotonic()


def _size(folder: Path) -> int:
    """The bytes of a folder's files on the disk: holes do not count."""
    files = [path.lstat() for path in folder.rglob("*")]
    return sum(512 * stat.st_blocks for stat in files)


def _files(folder: Path, below: tuple[str, ...]) -> Iterator[Path]:
    for part in below or (".",):
        path = folder / part
        yield from [path] if path.is_file() else sorted(path.rglob("*"))


def _unclear(said: str, *folders: Path) -> list[str]:
    """What is not clear in the words of a refusal."""
    lines = [
        line
        for line in said.replace("\r", "\n").splitlines()
        if line.startswith(("error: ", "fault: "))
    ]
    if not lines:
        return ["no error line"]
    if "Traceback" in said:
        return ["traceback"]
    names = {path.name for folder in folders for path in folder.rglob("*")}
    # of weights that are none the command names the model
    names |= {"the dense model", "broken weights"}
    if not any(name in line for line in lines for name in names):
        return ["names no file"]
    return []


def main(words: list[str] | None = None) -> int:
    """Run the cases that the command line asks for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--count", type=int, help="cases (10,000, or as --minutes says)"
    )
    parser.add_argument("--minutes", type=float, help="how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="SUBJECT")
    parser.add_argument("--subjects", type=Path, help="where they are kept")
    parser.add_argument("--case", type=int, help="this one, in all detail")
    parser.add_argument(
        "--keep", type=Path, help="where the changed files of --case go"
    )
    parser.add_argument("--out", type=Path, help="JSON lines of all failures")
    asked = parser.parse_args(words)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, resource.RLIM_INFINITY))
    count = asked.count or (10**9 if asked.minutes else 10_000)
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        fuzz = Fuzz(Path(folder), asked.only, asked.seed, asked.subjects)
        if asked.case is not None:
            result = fuzz.run(asked.case, asked.keep)
            print(json.dumps(asdict(result), indent=1).replace("\\n", "\n"))
            return 1 if result.failures else 0
        started, results = _now(), []
        for case in range(count):
            if asked.minutes and _now() - started > 60 * asked.minutes:
                break
            if case % 500 == 0 and case:
                print(f"{case} cases, {_now() - started:.0f} s", flush=True)
            results.append(fuzz.run(case))
            if results[-1].failures:
                _tell(results[-1], asked.out)
    print(summary(results))
    return 1 if any(result.failures for result in results) else 0


def _tell(result: Result, out: Path | None) -> None:
    print(f"case {result.case}, {result.subject}, {result.reader}, {result.change}: ")
    print(f"    {'; '.join(result.failures)}", flush=True)
    if out is not None:
        with out.open("a") as stream:
            stream.write(json.dumps(asdict(result)) + "\n")


def summary(results: list[Result]) -> str:
    """A table of subjects: cases, refused, taken as good, failures, slowest, memory."""
    lines = [
        "| files | cases | refused | taken | failures | slowest, s | memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (*sorted({result.subject for result in results}), "all"):
        of = [result for result in results if name in (result.subject, "all")]
        refused = sum(result.status != 0 for result in of)
        failed = sum(bool(result.failures) for result in of)
        cells = [name, len(of), refused, len(of) - refused, failed]
        cells += [max((r.seconds for r in of), default=0)]
        cells += [max((r.megabytes for r in of), default=0)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kinds = Counter(failure for result in results for failure in result.failures)
    lines += [f"{count} x {failure}" for failure, count in kinds.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
