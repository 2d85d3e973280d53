"""Root filesystems: made from Debian's archive, entered in namespaces of their own, copied, measured, removed.

Everything is mounted inside a mount namespace that ends with the process in it, so no mount is ever seen by this
machine or outlives a step.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What Debian's slim images leave out.
_SLIM = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*")
# Binds the root onto itself, gives it /proc, /dev and what else is asked for, and runs the command in it.
# Arguments: root, "ro" or "rw", lines of mounts ("bind SOURCE TARGET", "tmpfs TARGET OPTIONS"), command.
_ENTER = r"""
set -euo pipefail
root="$1" mode="$2" mounts="$3"; shift 3
mount --bind "$root" "$root"
if [ "$mode" = ro ]; then mount -o remount,bind,ro "$root"; fi
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
for device in null zero full random urandom tty; do
  touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
while read -r kind one two; do
  case "$kind" in
    bind) mount --bind "$one" "$root$two"; mount -o remount,bind,ro "$root$two" ;;
    share) mount --bind "$one" "$root$two" ;;
    tmpfs) mount -t tmpfs -o "$two" tmpfs "$root$one" ;;
  esac
done <<< "$mounts"
exec chroot "$root" "$@"
"""


class ProofError(Exception):
    """A step failed; the message is for people."""


@dataclass(frozen=True)
class Mounts:
    """What a process in a root sees beside the root's own files.

    ``read_only``, ``shared``: this machine's path -> the path in the root; ``memory``: path -> tmpfs options.
    """

    read_only: Mapping[Path, str] = field(default_factory=dict)
    shared: Mapping[Path, str] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> str:
        tmpfs = [f"tmpfs {target} {options}" for target, options in self.memory.items()]
        shared = [f"share {source} {target}" for source, target in self.shared.items()]
        return "\n".join([*tmpfs, *(f"bind {source} {target}" for source, target in self.read_only.items()), *shared])

    def place(self, root: Path) -> list[Path]:
        """Makes the mount points that are missing, as a container engine does; those made, deepest first."""
        made: list[Path] = []
        wanted = [(source.is_dir(), target) for source, target in {**self.read_only, **self.shared}.items()]
        for is_folder, target in [*wanted, *((True, target) for target in self.memory)]:
            point = root / target.lstrip("/")
            missing = [parent for parent in (point, *point.parents) if not parent.exists() and not parent.is_symlink()]
            for parent in reversed(missing):
                if parent == point and not is_folder:
                    parent.touch()
                else:
                    parent.mkdir()
                made.insert(0, parent)
        return made


def remove_points(points: list[Path]) -> None:
    """What ``place`` made, as far as it is still empty."""
    for point in points:
        if point.is_dir() and not point.is_symlink():
            if not any(point.iterdir()):
                point.rmdir()
        elif point.is_file() and point.stat().st_size == 0:
            point.unlink()


def enter(root: Path, command: Sequence[str], mounts: Mounts, *, read_only: bool = False) -> list[str]:
    """The command line that runs ``command`` in ``root``: process 1 of its own, gone with whoever started it."""
    mode = "ro" if read_only else "rw"
    spaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"]
    return [*spaces, "bash", "-c", _ENTER, "enter", str(root), mode, mounts.lines(), *command]


def as_user(user: str, command: Sequence[str]) -> list[str]:
    """``command`` as a container runs it: that uid and gid, no other group, no capability, none to be gained."""
    uid, _, gid = user.partition(":")
    drop = ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    return [*drop, "--no-new-privs", *command]


def bootstrap(root: Path, suite: str, log: Path) -> str:
    """A minimal Debian in ``root``, as its slim image is; the point release that it came out as."""
    found = subprocess.run(
        [ROOT / "ops" / "debian-tool", "mmdebstrap", "mmdebstrap"], capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        raise ProofError(found.stderr.strip())
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _SLIM]
    # Both are in the published images too; the second saves minutes of waiting for a disk.
    options += ["--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=force-unsafe-io"]
    program = Path(found.stdout.strip())
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}  # its own tools lie beside it
    command = [str(program), "--mode=root", "--variant=minbase", *options, suite, str(root)]
    run_logged(command, log, "Debian's minimal system cannot be made", env)
    for name in ("resolv.conf", "hostname"):  # this machine's; a container engine brings its own
        (root / "etc" / name).unlink(missing_ok=True)
    return (root / "etc" / "debian_version").read_text().strip()


def run_logged(command: Sequence[str], log: Path, complaint: str, env: Mapping[str, str]) -> None:
    """Runs ``command`` with its words in ``log``; ProofError with the last of them when it fails."""
    with log.open("ab") as output:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(env), check=False
        )
    if done.returncode != 0:
        tail = log.read_text(errors="replace").strip().splitlines()[-12:]
        raise ProofError(f"{complaint} (exit code {done.returncode}); {log} ends so:\n  " + "\n  ".join(tail))


def clone(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


def copy_tree(source: Path, target: Path) -> None:
    """A file, or a folder's contents, with owner, mode and time."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--reflink=auto", f"{source}/.", str(target)], check=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


def size_bytes(root: Path) -> int:
    """What its files hold; a file with several names counts once."""
    answer = subprocess.run(["du", "-sxb", str(root)], capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[0])


def mounted_below(folder: Path, table: str) -> list[str]:
    """Mount points at or below ``folder`` in ``table`` (the text of /proc/self/mountinfo)."""
    points = [line.split()[4].replace("\\040", " ") for line in table.splitlines()]
    return [point for point in points if Path(point).is_relative_to(folder)]


def remove(folder: Path) -> None:
    """Deletes ``folder``, unless anything is mounted below it: then what is mounted would be deleted too."""
    live = mounted_below(folder.resolve(), Path("/proc/self/mountinfo").read_text())
    if live:
        raise ProofError(f"{folder} is left alone: {', '.join(live)} is mounted; unmount it, then delete the folder.")
    shutil.rmtree(folder)
