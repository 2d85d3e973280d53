"""What a kubelet makes of a rendered pod, on one machine: its commands as real processes, in namespaces of its own.

Each pod has a network namespace (joined by a bridge, which is the node), a mount namespace with an otherwise empty
root filesystem and the pod's volumes, and a process namespace, so that a container's command is process 1. It runs as
the pod's user, without capabilities or new privileges. The image is this checkout and its environment, read-only.
"""

from __future__ import annotations

import base64
import ctypes
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from host_namespaces import run

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
CHECKOUT = (".venv", "cluster", "llm_cluster.egg-info")  # what an installed package is made of
SUBNET, NODE = "10.78.0", 254
CLONE_NEWNET = 0x40000000
INIT = "/opt/tini"  # where a pod sees the image's process 1
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
ETC = ("ld.so.cache", "nsswitch.conf", "host.conf", "gai.conf", "localtime", "protocols", "services")
SIZES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@functools.cache
def image() -> tuple[dict[str, str], list[str]]:
    """(environment, entry point) as ops/docker/Dockerfile sets them, with this checkout's environment for the image's."""
    text = (ROOT / "ops/docker/Dockerfile").read_text().replace("\\\n", " ")
    stage = text[text.index(" AS base\n") :]
    pairs = (word.partition("=") for word in shlex.split(re.search(r"^ENV (.*)$", stage, re.MULTILINE)[1]))
    environment = {name: value.replace("/opt/llm-cluster", sys.prefix) for name, _, value in pairs}
    program, *rest = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])
    assert Path(program).name == Path(INIT).name
    # This machine has few cores, and each rank would start a thread for every one of them.
    return {**environment, "OMP_NUM_THREADS": "1"}, [INIT, *rest]


def init_program() -> Path:
    """Process 1 of the image, from Debian; `FileNotFoundError` with the reason where it cannot be had."""
    found = subprocess.run([ROOT / "ops/debian-tool", "tini", "tini"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise FileNotFoundError(found.stderr.strip())
    return Path(found.stdout.strip())


def read_only(path: str | Path) -> list[str]:
    return [f"mkdir -p $R{path}; mount --bind {path} $R{path}; mount -o remount,bind,ro $R{path}"]


class Node:
    """The machine that the pods share: a bridge with an address, from where probes are sent."""

    def __init__(self) -> None:
        self.init = init_program()
        self.name = f"llmk{os.getpid()}"
        self.folder = Path(tempfile.mkdtemp(prefix="llmk-"))
        self.pods: list[Pod] = []
        self.hosts: dict[str, str] = {}
        self._inside = ThreadPoolExecutor(8, initializer=self._enter)

    @property
    def address(self) -> str:
        return f"{SUBNET}.{NODE}"

    def __enter__(self) -> Node:
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", "br0")
        for link in ("br0", "lo"):
            run("ip", "-n", self.name, "link", "set", link, "up")
        return self

    def _enter(self) -> None:
        """This thread alone, for good: a thread may have a network of its own."""
        with Path(f"/var/run/netns/{self.name}").open() as namespace:
            entered = ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET)
            assert entered == 0, os.strerror(ctypes.get_errno())

    def inside(self, what: Callable[..., Any], *arguments: object) -> Any:
        """Calls on the node's network; only for what makes its connections in the calling thread."""
        return self._inside.submit(what, *arguments).result(60)

    def add(self, name: str, spec: Json, objects: list[Json]) -> Pod:
        pod = Pod(self, name, f"{SUBNET}.{len(self.pods) + 1}", spec, objects)
        self.pods.append(pod)
        return pod

    def __exit__(self, *_: object) -> None:
        self._inside.shutdown()
        for pod in self.pods:
            pod.remove()
        run("ip", "netns", "del", self.name)
        shutil.rmtree(self.folder, ignore_errors=True)


class Container:
    """One running container: its process 1, and what it said."""

    def __init__(self, pod: Pod, spec: Json, launcher: subprocess.Popen[bytes], log: Path) -> None:
        self.pod, self.spec, self._launcher, self.log = pod, spec, launcher, log

    @property
    def pid(self) -> int:
        """Process 1 of the container, as this machine numbers it."""
        children = psutil.Process(self._launcher.pid).children()
        assert children, f"{self.pod.name} has ended: {self.said()}"
        return children[0].pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def exit_code(self, deadline_s: float) -> int:
        return self._launcher.wait(deadline_s)

    @property
    def runs(self) -> bool:
        return self._launcher.poll() is None

    def execute(self, command: list[str], deadline_s: float) -> subprocess.CompletedProcess[str]:
        """A command inside, as the container's user with its environment: what a hook of type exec is."""
        spec = self.pod.as_user(self.spec, command)
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--root", "--wd"]
        return subprocess.run([*enter, *spec], capture_output=True, text=True, timeout=deadline_s, check=False)

    def terminate(self) -> tuple[float, int]:
        """preStop, SIGTERM, then no longer than the grace period. (seconds, exit code)."""
        started = time.monotonic()
        grace_s = float(self.pod.spec["terminationGracePeriodSeconds"])
        hook = self.spec.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if hook:
            self.execute(hook, grace_s)
        os.kill(self.pid, signal.SIGTERM)
        try:
            code = self._launcher.wait(grace_s - (time.monotonic() - started))
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"{self.pod.name} outlived its {grace_s} s of grace: {self.said()}") from late
        return time.monotonic() - started, code

    def kill(self) -> None:
        if self.runs:
            for child in psutil.Process(self._launcher.pid).children():
                child.kill()  # process 1 of its namespace: the kernel ends the others
            self._launcher.wait(30)


class Pod:
    """A rendered pod with a network of its own; `start` runs its containers."""

    def __init__(self, node: Node, name: str, address: str, template: Json, objects: list[Json]) -> None:
        self.node, self.name, self.address = node, name, address
        self.spec: Json = template["spec"]
        self.labels: dict[str, str] = template["metadata"]["labels"]
        self.namespace = f"{node.name}p{address.rpartition('.')[2]}"
        self.folder = node.folder / name
        self.containers: list[Container] = []
        self._objects = {(one["kind"], one["metadata"]["name"]): one for one in objects}
        self._make_network()

    def _make_network(self) -> None:
        port = self.namespace[-8:]
        run("ip", "netns", "add", self.namespace)
        switch = ("netns", self.node.name, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        run("ip", "link", "add", port, *switch)
        run("ip", "-n", self.node.name, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            run("ip", "-n", self.namespace, "link", "set", link, "up")
        for one in self.spec["securityContext"].get("sysctls", []):
            run("ip", "netns", "exec", self.namespace, "sysctl", "-qw", f"{one['name']}={one['value']}")

    def start(self) -> list[Container]:
        self._write_volumes()
        for spec in self.spec["containers"]:
            script = self.folder / f"{spec['name']}.sh"
            script.write_text("\n".join(self._script(spec)) + "\n")
            log = self.folder / f"{spec['name']}.log"
            with log.open("wb") as output:
                launcher = subprocess.Popen(
                    ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--pid", "--fork", "--kill-child",
                     "--propagation", "private", "bash", "-eu", script],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            self.containers.append(Container(self, spec, launcher, log))
        return self.containers

    def _write_volumes(self) -> None:
        """What comes from objects, as a kubelet lays it out: files behind one link, so that all change at once."""
        for volume in self.spec["volumes"]:
            folder = self.folder / "volumes" / volume["name"]
            folder.mkdir(parents=True)
            files: dict[str, bytes] = {}
            if "configMap" in volume:
                found = self._objects["ConfigMap", volume["configMap"]["name"]]["data"]
                files = {key: text.encode() for key, text in found.items()}
            elif "secret" in volume:
                found = self._objects["Secret", volume["secret"]["secretName"]]["data"]
                items = volume["secret"].get("items", [{"key": key, "path": key} for key in found])
                files = {item["path"]: base64.b64decode(found[item["key"]]) for item in items}
            mode = volume.get("configMap", volume.get("secret", {})).get("defaultMode", 0o644)
            self._put(folder, files, mode)

    def _put(self, folder: Path, files: Mapping[str, bytes], mode: int) -> None:
        if not files:
            return
        version = Path(tempfile.mkdtemp(prefix="..v", dir=folder))
        version.chmod(0o755)
        for name, content in files.items():
            (version / name).write_bytes(content)
            os.chown(version / name, 0, self.spec["securityContext"]["fsGroup"])
            (version / name).chmod(mode)
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(f"..data/{name}")
        (folder / "..new").symlink_to(version.name)
        (folder / "..new").rename(folder / "..data")

    def change_config(self, volume: str, files: Mapping[str, str]) -> None:
        """As when the ConfigMap behind a volume was changed."""
        self._put(self.folder / "volumes" / volume, {name: text.encode() for name, text in files.items()}, 0o644)

    def _script(self, container: Json) -> list[str]:
        """Builds the root filesystem in the mount namespace that it runs in, and becomes the container's command."""
        root = self.folder / f"{container['name']}.root"
        root.mkdir()
        (self.folder / "hosts").write_text(
            "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **self.node.hosts}.items())
        )
        user = self.spec["securityContext"]["runAsUser"]
        lines = [
            f"R={root}",
            "mount -t tmpfs -o mode=755 root $R",
            "mkdir -p $R/proc $R/sys $R/dev $R/etc $R/tmp $R/var/run $R/root $R/usr",
            "cp -a /bin /sbin /lib /lib64 $R/",  # links into /usr
            f"cp -a {' '.join(f'/etc/{name}' for name in ETC if Path('/etc', name).exists())} $R/etc/",
            f"mkdir -p $R/opt; cp {self.node.init} $R{INIT}",
            f"echo 'llm-cluster:x:{user}:{user}::/var/lib/llm-cluster:/usr/sbin/nologin' > $R/etc/passwd",
            f"echo 'llm-cluster:x:{user}:' > $R/etc/group",
            f"cp {self.folder}/hosts $R/etc/hosts",
            "mount -t proc proc $R/proc",
            "mount --rbind /sys $R/sys",
            "mount -t tmpfs -o mode=755 dev $R/dev",
            f"for d in {' '.join(DEVICES)}; do touch $R/dev/$d; mount --bind /dev/$d $R/dev/$d; done",
            "ln -s /proc/self/fd $R/dev/fd; mkdir -m 1777 $R/dev/shm",
        ]
        lines += read_only("/usr")
        for volume in self.spec["volumes"]:
            lines += self._volume(volume)
        for mount in container["volumeMounts"]:
            target, source = f"$R{mount['mountPath']}", self.folder / "volumes" / mount["name"]
            lines.append(f"mkdir -p {target}; mount --bind {source} {target}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {target}")
        # After the volumes, one of which may hide the folder of a checkout (/tmp); its parts, since it may be private.
        for path in (Path(sys.base_prefix), *(ROOT / part for part in CHECKOUT)):
            lines += read_only(path)
        if container["securityContext"]["readOnlyRootFilesystem"]:
            lines.append("mount -o remount,ro $R")
        command = [*container.get("command", image()[1]), *container.get("args", [])]
        return [*lines, "cd /", f"exec chroot $R {shlex.join(self.as_user(container, command))}"]

    def _volume(self, volume: Json) -> list[str]:
        folder = self.folder / "volumes" / volume["name"]
        if "emptyDir" not in volume:
            return []
        limit = volume["emptyDir"].get("sizeLimit", "1Gi")
        number, unit = re.fullmatch(r"(\d+)(\wi)", limit).groups()
        group = self.spec["securityContext"]["fsGroup"]
        return [f"mount -t tmpfs -o size={int(number) * SIZES[unit]},mode=2777,gid={group} {volume['name']} {folder}"]

    def as_user(self, container: Json, command: list[str]) -> list[str]:
        """The command with the user, the privileges and the whole environment that the pod gives it."""
        pod, own = self.spec["securityContext"], container["securityContext"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["allowPrivilegeEscalation"] is False
        environment = {**image()[0], "HOSTNAME": self.name}
        for variable in container["env"]:
            environment[variable["name"]] = self._value(variable)
        expanded = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word) for word in command]
        return [
            "setpriv", f"--reuid={pod['runAsUser']}", f"--regid={pod['runAsGroup']}", f"--groups={pod['fsGroup']}",
            "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all",
            "env", "-i", *(f"{name}={value}" for name, value in environment.items()), *expanded,
        ]  # fmt: skip

    def _value(self, variable: Json) -> str:
        if "value" in variable:
            return str(variable["value"])
        field = variable["valueFrom"]["fieldRef"]["fieldPath"]
        return {"status.podIP": self.address, "metadata.name": self.name}[field]

    def listening(self) -> set[int]:
        """Ports that others can reach: whatever listens on more than the loopback."""
        table = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-Hltn"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        ends = [line.split()[3].rpartition(":") for line in table.splitlines()]
        return {int(port) for address, _, port in ends if not address.strip("[]").startswith(("127.", "::1"))}

    def remove(self) -> None:
        for container in self.containers:
            container.kill()
        run("ip", "netns", "del", self.namespace)


class Prober:
    """Sends a running container's probes as they are written, from the node, for as long as it is entered."""

    def __init__(self, node: Node, containers: list[Container], get: Callable[[str, float], int]) -> None:
        self._node, self._get = node, get
        self._stop = threading.Event()
        self._watched = [Health(one) for one in containers]
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def _loop(self) -> None:
        while not self._stop.wait(0.1):
            for health in self._watched:
                health.step(time.monotonic(), lambda *a: self._node.inside(self._get, *a))

    @property
    def ready(self) -> bool:
        return all(health.ready for health in self._watched)

    @property
    def story(self) -> dict[str, list[str]]:
        return {health.container.pod.name: health.story for health in self._watched}

    @property
    def killed(self) -> list[str]:
        """Containers that a kubelet would have restarted."""
        return [health.container.pod.name for health in self._watched if health.killed]

    def leave(self, container: Container) -> None:
        """No more probes: a kubelet sends none to a pod that ends."""
        self._watched = [health for health in self._watched if health.container is not container]

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)


class Health:
    """A kubelet's view of one container, by its probes."""

    def __init__(self, container: Container) -> None:
        self.container, self.story = container, []
        self.started, self.ready, self.killed = False, False, False
        self._began = time.monotonic()
        self._due: dict[str, float] = {}
        self._failures: dict[str, int] = {}

    def step(self, now: float, get: Callable[[str, float], int]) -> None:
        kinds = ("livenessProbe", "readinessProbe") if self.started else ("startupProbe",)
        for kind in kinds:
            probe = self.container.spec[kind]
            if now >= self._due.setdefault(kind, self._began + probe.get("initialDelaySeconds", 0)):
                self._due[kind] = now + probe.get("periodSeconds", 10)
                self._judge(kind, probe, get(self._url(probe), probe.get("timeoutSeconds", 1)))

    def _url(self, probe: Json) -> str:
        wanted = probe["httpGet"]["port"]
        ports = {port["name"]: port["containerPort"] for port in self.container.spec["ports"]}
        return f"http://{self.container.pod.address}:{ports.get(wanted, wanted)}{probe['httpGet']['path']}"

    def _judge(self, kind: str, probe: Json, status: int) -> None:
        good = 200 <= status < 400
        self.story.append(f"{time.monotonic() - self._began:.0f} s {kind} {status}")
        self._failures[kind] = 0 if good else self._failures.get(kind, 0) + 1
        failed = self._failures[kind] >= probe.get("failureThreshold", 3)
        if kind == "readinessProbe":
            self.ready = good or (self.ready and not failed)
        elif failed:
            self.killed = True
        elif good and kind == "startupProbe":
            self.started = True
