"""Measure a guard's server under load from Triton's client, next to the bare model behind the same server.

    python benchmarks/guard_load.py --client PYTHON [--seconds 60]

The embedded backdoored model is served on loopback with the filters that a guard has if none is named, and
then without any. Four clients send one image at a time, one fifth of them triggered, and among ten requests
three bad ones: a wrong shape, a wrong type, values that are not finite, another model, a body that is not
JSON, one that is too large. Every request has a number, which the answer repeats, and every image a class.
PYTHON is an interpreter with tritonclient[http] and NumPy; if none is given, this one.

Ends with 4 if a request is lost, answered twice, answered with what belongs to another or with another
status, if the server counts others than the clients, or if its memory grows by more than a tenth.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measuring

CLIENTS, WARM_UP, IMAGES, NAME = 4, 3.0, 397, "model"
#: Kinds of bad requests, and the status that each gets.
BAD = {
    "wrong shape": 400,
    "wrong type": 400,
    "not finite": 400,
    "another model": 404,
    "not JSON": 400,
    "too large": 413,
}
#: Requests after which the kinds come again; each bad kind comes once, the rest are good.
ROUND = 20


# The server


def serve(kind: str) -> None:
    """Serve the model with its filters, or without any, until a signal says to stop."""
    import numpy as np

    from doorward import bundled, open_classifier
    from doorward.detectors.inputs.base import FittedFilters, InputFilter, Scored
    from doorward.guard.guard import Guard
    from doorward.guard.pipeline import GuardRequest
    from doorward.guard.serving.app import build
    from doorward.guard.serving.run import ServeRequest, listen

    class Nothing(InputFilter):
        """Accept everything at once."""

        highest = 0.0

        def score(self, classifier: Any, inputs: Any, logits: Any, **_: Any) -> Scored:
            """Return zeros."""
            return Scored(np.zeros(len(inputs)), ("",) * len(inputs))

    classifier = open_classifier(bundled.model("backdoored"))
    if kind == "guarded":
        guard = Guard.fit(classifier, bundled.fashion_mnist("test"))
    else:
        none = FittedFilters((Nothing(),), ({},), np.ones(1), np.zeros((1, 1)))
        guard = Guard(classifier=classifier, fitted=none, rate=0.01, rule="conformal")
    wanted = ServeRequest(guard=GuardRequest(model=NAME), port=0)
    listen(build(guard, name=NAME), wanted, lambda text: print(text, flush=True))


# The clients, which know nothing of Doorward


def drive(address: str, file: str, seconds: float) -> None:
    """Send requests for some time from several threads, and print what came of them as JSON."""
    import numpy as np

    held = np.load(file)
    images, classes = held["images"], held["classes"].tolist()
    ended = time.monotonic() + seconds
    told: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda i=i: told.append(client(i, address, images, classes, ended)))
        for i in range(CLIENTS)
    ]
    begun = time.monotonic()
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    print(json.dumps({"seconds": time.monotonic() - begun, "clients": told}))


def client(number: int, address: str, images: Any, classes: Any, ended: float) -> dict[str, Any]:
    """Send one request after another, and return what came of them."""
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    connection = triton.InferenceServerClient(address)
    kinds = list(BAD) + ["good"] * (ROUND - len(BAD))
    sent, odd, answered, wrong, milliseconds = Counter[str](), Counter[str](), Counter[str](), 0, []
    i = number
    while time.monotonic() < ended:
        kind, row, own = kinds[(i // CLIENTS) % ROUND], i % len(images), f"{number}-{i}"
        sent[kind] += 1
        begun = time.perf_counter()
        try:
            if kind in ("not JSON", "too large"):
                status = raw(address, kind)
            else:
                answer = connection.infer(
                    "other" if kind == "another model" else NAME,
                    [tensor(triton, kind, images[row : row + 1])],
                    request_id=own,
                )
                status = 200
                answered[answer.get_response()["id"]] += 1
                wrong += (
                    answer.get_response()["id"] != own or int(answer.as_numpy("class")[0]) != classes[row]
                )
                milliseconds.append(1000 * (time.perf_counter() - begun))
        except InferenceServerException as error:
            status = int(error.status() or 0)
        except OSError as error:
            status = 0
            odd[f"{kind}: {type(error).__name__}"] += 1
        if status != BAD.get(kind, 200):
            odd[f"{kind}: {status}"] += 1
        i += CLIENTS
    connection.close()
    return {
        "sent": sent,
        "odd": odd,
        "answered": len(answered),
        "answered twice": sum(count - 1 for count in answered.values()),
        "of another": wrong,
        "milliseconds": milliseconds,
    }


def tensor(triton: Any, kind: str, image: Any) -> Any:
    """Return the input tensor of a request of that kind."""
    import numpy as np

    values, datatype = image, "UINT8"
    if kind == "wrong shape":
        values = image[..., :-1]
    elif kind == "wrong type":
        values, datatype = image.astype(np.int64), "INT64"
    elif kind == "not finite":
        values, datatype = np.full(image.shape, np.nan, np.float32), "FP32"
    made = triton.InferInput("images", list(values.shape), datatype)
    made.set_data_from_numpy(np.ascontiguousarray(values))
    return made


def raw(address: str, kind: str) -> int:
    """Send what Triton's client never would, and return the status."""
    connection = http.client.HTTPConnection(address, timeout=60)
    length = {"Content-Length": str(1 << 40)} if kind == "too large" else {}
    connection.request("POST", f"/v2/models/{NAME}/infer", None if length else b"{", length)
    status = connection.getresponse().status
    connection.close()
    return status


# The measurement


def measure(kind: str, python: str, seconds: float, file: str) -> dict[str, Any]:
    """Start a server, drive it, stop it, and return what was seen."""
    own = [sys.executable, __file__, "--serve", kind]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(own, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().rpartition("//")[2].strip()

            def driven(limit: float) -> Any:
                words = [python, __file__, "--drive", address, "--images", file, "--seconds", str(limit)]
                done = subprocess.run(words, capture_output=True, text=True, timeout=limit + 120, check=False)
                if done.returncode:
                    raise SystemExit(f"the client ended with {done.returncode}:\n{done.stderr[-2000:]}")
                return json.loads(done.stdout)

            driven(WARM_UP)
            before, counted, load = resident(server.pid), count(address), os.getloadavg()[0]
            seen = driven(seconds)
            after, counted = resident(server.pid), count(address) - counted
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        finally:
            server.kill()
    return {"load": [round(load, 2), round(os.getloadavg()[0], 2)], "ended with": code} | summed(
        seen, counted, (before, after)
    )


def summed(seen: Any, counted: int, memory: tuple[int, int]) -> dict[str, Any]:
    """Return what all clients saw."""
    told = seen["clients"]
    sent = sum((Counter(one["sent"]) for one in told), Counter[str]())
    times = sorted(value for one in told for value in one["milliseconds"])
    return {
        "seconds": round(seen["seconds"], 1),
        "requests": sent.total(),
        "by kind": dict(sorted(sent.items())),
        "lost": sent["good"] - sum(one["answered"] for one in told),
        "answered twice": sum(one["answered twice"] for one in told),
        "of another": sum(one["of another"] for one in told),
        "odd": dict(sum((Counter(one["odd"]) for one in told), Counter[str]())),
        "counted by the server": counted,
        "requests a second": round(sent.total() / seen["seconds"], 1),
        "p50 ms": round(times[len(times) // 2], 2),
        "p99 ms": round(times[min(len(times) - 1, len(times) * 99 // 100)], 2),
        "memory at start": memory[0],
        "memory at end": memory[1],
    }


def resident(process: int) -> int:
    """Return the bytes of memory that a process holds."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])


def count(address: str) -> int:
    """Return how many requests for inference the server says that it answered."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return sum(
        int(float(one)) for one in re.findall(r"^doorward_guard_requests_total\{.*\} (\S+)$", text, re.M)
    )


def write_images(file: Path) -> None:
    """Write images, one fifth of them triggered, and the classes that the model answers with."""
    import numpy as np

    from doorward import bundled, open_classifier
    from doorward.attacks.ground_truth import read_plant, triggered
    from doorward.models.batching import batched_logits
    from doorward.models.encode.image import to_float, to_tensor

    folder = bundled.model("backdoored")
    classifier, clean = open_classifier(folder), bundled.fashion_mnist("train")
    images = to_tensor(clean.select(range(IMAGES)), classifier.spec)
    bad = triggered(clean.select(range(IMAGES)), read_plant(folder / "plant.json"))
    images[::5] = to_tensor(bad.select(range(len(images[::5]))), classifier.spec)
    classes = batched_logits(classifier, to_float(images)).argmax(1)
    np.savez(file, images=images.numpy(), classes=classes.numpy())


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows = [
        [
            {"guarded": "guarded", "bare": "without filters"}[name],
            f"{row['requests']:,}",
            str(row["lost"]),
            str(row["answered twice"]),
            f"{row['requests a second']:g}",
            f"{row['p50 ms']:g} ms",
            f"{row['p99 ms']:g} ms",
            f"{measuring.megabytes(row['memory at start'])}, {measuring.megabytes(row['memory at end'])}",
            f"{max(row['load']):.1f} on {results['processors']}",
        ]
        for name, row in results["servers"].items()
    ]
    heads = ["server", "requests", "lost", "answered twice", "a second", "p50", "p99", "memory at start, end"]
    heads.append("load of processors")
    return measuring.markdown(heads, rows)


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Return what is not as it must be."""
    for name, row in results["servers"].items():
        for what in ("lost", "answered twice", "of another"):
            if row[what]:
                yield f"{name}: {row[what]} {what}"
        for what, times in row["odd"].items():
            yield f"{name}: {what}, {times} times"
        sent, counted = row["requests"], row["counted by the server"]
        if sent != counted:
            yield f"{name}: {sent:,} requests were sent, and the server counts {counted:,}"
        if row["memory at end"] > 1.1 * row["memory at start"]:
            yield f"{name}: its memory grows"
        if row["ended with"] != -signal.SIGTERM:
            yield f"{name}: told to stop, it ended with {row['ended with']}"


def main() -> None:
    """Measure both servers and write it down."""
    made = measuring.parser(__doc__, threads=1)
    made.add_argument("--client", default=sys.executable, help="an interpreter with tritonclient[http]")
    made.add_argument("--seconds", type=float, default=60.0, help="of load on each server")
    for inner in ("serve", "drive", "images"):
        made.add_argument(f"--{inner}", help="what the measurement itself starts")
    given = made.parse_args()
    if given.drive:
        drive(given.drive, given.images, given.seconds)
    elif given.serve:
        serve(given.serve)
    else:
        results = measuring.begin(given.threads)
        asked = "import importlib.metadata as m; print(m.version('tritonclient'))"
        version = subprocess.run([given.client, "-c", asked], capture_output=True, text=True, check=True)
        results["packages"]["tritonclient"] = version.stdout.strip()
        results |= {"clients": CLIENTS, "limit": given.seconds, "servers": {}}
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "images.npz"
            write_images(file)
            for kind in ("guarded", "bare"):
                results["servers"][kind] = measure(kind, given.client, given.seconds, str(file))
        measuring.conclude("guard-load", results, table(results), failures(results))


if __name__ == "__main__":
    main()
