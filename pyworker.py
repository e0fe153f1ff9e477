#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.36", "websocket-client>=1.8"]
# ///
"""ComfyUI PyWorker: turns a GPU box with ComfyUI into an HTTP API, in one file.

    POST /generate/sync   runs one ComfyUI workflow and answers when its outputs are delivered
    GET  /health          tells the platform whether the worker is in order
    GET  /metrics         tells Prometheus what it has done

A request becomes a `Job`. The files that its workflow names are fetched, it waits in the `Line` for the one GPU, runs
in ComfyUI, and its outputs are delivered into the answer, into S3 and to a webhook. ComfyUI is spoken to over HTTP; one
websocket connection, kept for the worker's life and always drained, tells when a prompt ends. What ComfyUI's history
says is authoritative: the websocket only says when to look. When the connection is lost, history and queue are looked
up until the prompt has ended, and a prompt that ComfyUI lost with it is sent again, once.

Each HTTP connection has a thread; one lock around submit-to-finished keeps the GPU to one job, and everything else
(checking, fetching, uploading, webhooks) runs outside it. MIT licence.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import fnmatch
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import mimetypes
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import socketserver
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, BinaryIO

try:
    import websocket
except ImportError:
    sys.exit(
        "WORKER_ERROR: the package websocket-client is missing; install it with: pip install websocket-client"
    )

__version__ = "1.0.0"
COST = 100  # of each request: the static figure that an autoscaler is given

log = logging.getLogger("pyworker")

Graph = dict[
    str, dict[str, Any]
]  # ComfyUI's API format: node id -> {"class_type": …, "inputs": {…}}
Output = dict[str, Any]  # one entry of an answer's "output"
Message = dict[str, Any]  # one websocket message: {"type": …, "data": {…}}

# What a connection that cannot be made, or breaks, raises in http.client and socket alike.
CONNECTION_LOST = (OSError, http.client.HTTPException)


# Settings #############################################################################################################

Reader = Callable[
    [Any], Any
]  # checks one value and returns what it means; its ValueError says what it has to be

BLANK: tuple[Any, ...] = ("", {}, None)  # what templates leave in a field that is not filled in


def reader(words: str, fits: Callable[[Any], Any]) -> Reader:
    """Makes a reader that takes what fits, as it is."""

    def read(value: Any) -> Any:
        if not fits(value):
            raise ValueError(f"has to be {words}")
        return value

    return read


def number(low: float, high: float, *kinds: type) -> Reader:
    """Makes a reader of numbers in that range; without bool, which is a kind of int in Python."""
    words = f"a {'number' if float in kinds else 'whole number'} from {low:g} to {high}"
    return reader(words, lambda value: type(value) in kinds and low <= value <= high)


def matching(pattern: str, words: str) -> Reader:
    """Makes a reader of strings that match the pattern as a whole."""
    return reader(words, lambda value: isinstance(value, str) and re.fullmatch(pattern, value))


def read_fields(given: Mapping[str, Any], readers: Mapping[str, Reader]) -> dict[str, Any]:
    """What each reader makes of its field; blank fields count as absent. ValueError names the field at fault."""
    values = {}
    for name, read in readers.items():
        try:
            if given.get(name) not in BLANK:
                values[name] = read(given[name])
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return values


def is_url(text: Any) -> bool:
    """Whether it is an http(s) URL that http.client will take: without spaces, control and non-ASCII characters."""
    with contextlib.suppress(
        ValueError
    ):  # of a port or a name that is none, or a bracket without its twin
        parts = urllib.parse.urlsplit(text if isinstance(text, str) else "")
        # a % would begin an IPv6 address' zone, which libraries read in ways of their own
        is_web = (
            parts.scheme in ("http", "https")
            and parts.port != 0
            and not re.search("[@%]", parts.netloc)
        )
        return bool(
            is_web and re.fullmatch(r"[!-~]+", text) and (parts.hostname or "").encode("idna")
        )
    return False


def read_signing_key(secret: Any) -> bytes:
    """The bytes of a Standard Webhooks secret."""
    with contextlib.suppress(ValueError):
        key = base64.b64decode(secret[6:], validate=True) if isinstance(secret, str) else b""
        if key and secret.startswith("whsec_"):
            return key
    raise ValueError("has to be 'whsec_' and base64, as the Standard Webhooks specification has it")


URL_WORDS = "an http:// or https:// URL in plain ASCII, without a password, such as https://example.com/path"
read_text = matching(r"(?s:.*)", "a string")
read_plain = matching(r"[!-~]+", "a string in plain ASCII, without spaces")
read_flag = reader("true or false", lambda value: isinstance(value, bool))
read_object = reader("an object", lambda value: isinstance(value, dict))
read_url = reader(URL_WORDS, is_url)
read_count = number(0, 2**53, int)  # beyond, JSON's numbers are no longer exact
read_seconds = number(0, 10**7, int, float)  # 115 days: threads cannot wait much longer
read_timeout = number(0.001, 3600, int, float)


def _setting(default: Any, read: Reader, text: str) -> Any:
    return field(default=default, metadata={"read": read, "help": text})


@dataclass(frozen=True, repr=False)  # it holds secrets
class Settings:
    """The environment, read once. A field's variable is its name in upper case; durations are in seconds."""

    worker_host: str = _setting("127.0.0.1", read_text, "address to listen on")
    port: int = _setting(8000, number(0, 65535, int), "port to listen on")
    comfyui_api_base: str = _setting("http://127.0.0.1:8188", read_url, "where ComfyUI answers")
    comfyui_install_path: str = _setting(
        "", read_text, "ComfyUI's folder; set, an answer shows each file's local_path"
    )
    comfyui_return_timeout: float = _setting(
        120.0, read_seconds, "seconds that ComfyUI may stay away under a job"
    )
    auth_token: str = _setting(
        "", read_plain, "what clients have to send as 'Authorization: Bearer <token>'"
    )
    max_queue_size: int = _setting(
        100, read_count, "jobs that may wait for the GPU; the next one gets 503"
    )
    max_body_bytes: int = _setting(64 << 20, read_count, "largest request body")
    max_input_bytes: int = _setting(
        100 << 20, read_count, "largest file that a workflow may name by its URL"
    )
    output_base64_max_bytes: int = _setting(
        64 << 20, read_count, "largest file that an answer carries as base64"
    )
    job_timeout: float = _setting(
        0.0, read_seconds, "seconds that a job may take on the GPU; 0: no limit"
    )
    shutdown_grace: float = _setting(
        300.0, read_seconds, "seconds that SIGTERM leaves a running job and webhooks"
    )
    s3_access_key_id: str = _setting(
        "", read_plain, "S3 key; with neither key set, boto3's own chain is used"
    )
    s3_secret_access_key: str = _setting("", read_plain, "its secret")
    s3_bucket_name: str = _setting("", read_plain, "bucket; naming one turns S3 on")
    s3_endpoint_url: str = _setting("", read_url, "S3 server; empty: AWS")
    s3_region: str = _setting("", read_plain, "its region")
    s3_prefix: str = _setting("", read_text, "put before every S3 key")
    s3_connect_timeout: float = _setting(
        60.0, read_timeout, "seconds until a connection to S3 counts as failed"
    )
    s3_connect_attempts: int = _setting(
        3, number(1, 1000, int), "tries of each S3 request, the first one included"
    )
    s3_url_expires: int = _setting(
        604800, number(1, 604800, int), "seconds that a presigned URL is valid"
    )
    webhook_url: str = _setting("", read_url, "gets a POST for every job that ends")
    webhook_timeout: float = _setting(
        30.0, read_timeout, "seconds until a webhook's receiver counts as silent"
    )
    webhook_secret: bytes = _setting(
        b"", read_signing_key, "signs what goes to WEBHOOK_URL: whsec_ and base64"
    )
    workflow_file: str = _setting("", read_text, "the workflow of RawWorkflow, in API format")
    workflows_dir: str = _setting(
        "", read_text, "folder of workflows; each is a modifier under its file's name"
    )
    default_checkpoint: str = _setting(
        "", read_text, "Text2Image's checkpoint; empty: the first that ComfyUI lists"
    )
    include_comfyui_response: bool = _setting(
        False, read_flag, "put ComfyUI's history entry into every answer"
    )
    allow_private_addresses: bool = _setting(
        False, read_flag, "let URLs in requests lead to private addresses"
    )
    comfy_org_api_key: str = _setting("", read_plain, "passed on to ComfyUI for its partner nodes")

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Reads and checks the environment; ValueError names the variable at fault, never a secret's value."""
        rows = {each.name.upper(): each for each in fields(cls)}
        given = {
            name: _from_text(environ.get(name, "").strip(), each.default)
            for name, each in rows.items()
        }
        values = read_fields(given, {name: each.metadata["read"] for name, each in rows.items()})
        settings = cls(**{name.lower(): value for name, value in values.items()})
        if bool(settings.s3_access_key_id) != bool(settings.s3_secret_access_key):
            raise ValueError(
                "S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY come in pairs: set both or neither"
            )
        return settings


def _from_text(text: str, default: Any) -> Any:
    """The number or truth value that the text is, as JSON has it, where the default is one; else the text itself."""
    with contextlib.suppress(ValueError):  # the reader refuses it
        return json.loads(text.lower()) if isinstance(default, (int, float)) else text
    return text


# Errors ###############################################################################################################


class JobError(Exception):
    """A job's failure, raised where it is known and answered in one place.

    status: of HTTP. type: one of the contract's, for programs. message: one sentence that a person can act on.
    details: what else goes into the answer's `error`.
    """

    def __init__(self, status: int, type: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.status, self.type, self.message, self.details = status, type, message, details

    @property
    def outcome(self) -> str:
        """The envelope's `status`."""
        return self.type if self.type in ("timeout", "cancelled") else "failed"


def invalid(message: str, type: str = "invalid_request", **details: Any) -> JobError:
    """A request that is not in order."""
    return JobError(400, type, message, **details)


def not_ready(state: str) -> JobError:
    """What a worker answers to a job that it cannot begin."""
    if state == "stopping":
        return JobError(
            503,
            "shutting_down",
            "the worker is stopping; send the job again, to another one or later",
        )
    trouble = {"starting": "is not up yet", "faulted": "has lost its GPU and has to be restarted"}
    return JobError(
        503,
        "comfyui_unavailable",
        f"ComfyUI {trouble.get(state, 'does not answer')}; try again later",
    )


# Job ##################################################################################################################

RANDOM_INT = "__RANDOM_INT__"
MAX_JSON_VALUES = (
    10**6
)  # graphs have some thousands; 64 MiB of "[],[],[]" would take 3 GB and half a minute
MAX_JSON_DEPTH = (
    100  # ComfyUI's own graphs nest 5 deep; deeper ones only serve to exhaust the stack
)
EVENT_STREAM, JSON, BYTES = "text/event-stream", "application/json", "application/octet-stream"
TIMINGS = ("queue_ms", "preprocess_ms", "generation_ms", "postprocess_ms")


@dataclass(repr=False, eq=False)
class Job:
    """A request on its way to its answer: checked, so that nothing downstream has to check it again."""

    request: dict[str, Any] = field(default_factory=dict)  # until it is read
    request_id: str | None = None  # None where the body could not be read
    modifier: str = ""
    modifications: dict[str, Any] = field(default_factory=dict)
    workflow: Graph = field(default_factory=dict)  # empty until the modifier has built it
    settings: Settings = field(
        default_factory=Settings
    )  # the operator's, under what the request says of its own
    chosen: set[str] = field(default_factory=set)  # the settings that the request changed
    extra_params: dict[str, Any] = field(default_factory=dict)  # of the webhook
    return_outputs_as_base64: bool = False
    output_format: str = ""  # what still images are converted to: webp or jpeg
    output_quality: int = 90
    accept: str = (
        ""  # the header; once the job is read, the media range that is to be answered with
    )
    prefer: str = ""  # the header
    on_event: Callable[[str, dict[str, Any]], None] | None = (
        None  # hears of the job's life: its name, and about it
    )
    connection: socket.socket | None = None  # of its client
    prompt_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    received_at: float = field(default_factory=time.time)
    timings: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(TIMINGS, 0.0)
    )  # milliseconds
    # what a waiting or running job has to hear: its turn, ComfyUI's messages, a lost connection, an order to stop
    inbox: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    has_turn: bool = False  # on the GPU
    is_submitted: threading.Event = field(
        default_factory=threading.Event
    )  # ComfyUI has answered, or never will
    was_accepted: bool = (
        False  # its request was in order and it found a place in the queue: its webhook is owed
    )
    entry: dict[str, Any] = field(default_factory=dict)  # of ComfyUI's history
    outputs: list[Output] = field(default_factory=list)
    answer_file: Output | None = None  # whose bytes are the answer
    percent: float = 0.0  # of its progress, as far as it was told
    stopped: JobError | None = None  # the error of `stop`
    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the milliseconds that the block took to the timing of that name."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings[name] += (time.monotonic() - start) * 1000

    def tell(self, event: str, **about: Any) -> None:
        """Tells who listens what becomes of the job."""
        if self.on_event:
            self.on_event(event, about)

    @property
    def is_async(self) -> bool:
        """Whether the answer is to come before the job has run (RFC 7240)."""
        return any(
            each.partition(";")[0].strip() == "respond-async"
            for each in self.prefer.lower().split(",")
        )

    @property
    def files(self) -> list[Output]:
        """The outputs that are files."""
        return [output for output in self.outputs if "filename" in output]

    def distrusts(self, setting: str) -> bool:
        """Whether that setting, a URL, came with the request and may lead to public addresses only."""
        return setting in self.chosen and not self.settings.allow_private_addresses

    def stop(self, error: JobError) -> None:
        """Ends a waiting or running job with that error; a running prompt is interrupted."""
        self.stopped = error
        self.inbox.put({"type": "stop", "error": error})

    def next_message(self, seconds: float | None = None) -> Message | None:
        """The next message for the job, None when there was none for so long; raises the error of `stop`."""
        try:
            message = self.inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if "error" in message:
            raise message["error"]
        return message


def parse_request(body: bytes) -> dict[str, Any]:
    """The request: {"input": {…}}, or what has that in the serverless envelope's "payload"; 400 otherwise."""
    if not body.strip():
        raise invalid('the body is empty; send JSON: {"input": {"workflow_json": {...}}}')
    if sum(body.count(each) for each in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise invalid(f"the body has more than {MAX_JSON_VALUES} values")
    try:
        value = json.loads(body, parse_constant=_finite, parse_float=_finite)
        json.dumps(
            change_text(value, str, MAX_JSON_DEPTH), ensure_ascii=False
        ).encode()  # halves of surrogate pairs
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise invalid(f"the body is not JSON that can be read: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("payload"), dict):
        value = value["payload"]
    if not isinstance(value, dict) or not isinstance(value.get("input"), dict):
        raise invalid(
            'the body has to be a JSON object with the job in "input": {"input": {"workflow_json": {...}}}'
        )
    return dict(value)


def _finite(text: str) -> float:
    if not float("-inf") < float(text) < float("inf"):  # as NaN is not either
        raise ValueError(f"{text:.20} is no number that JSON has")
    return float(text)


def change_text(value: Any, change: Callable[[str], Any], depth: int = 2 * MAX_JSON_DEPTH) -> Any:
    """A copy of the JSON value with what `change` makes of each text in it; RecursionError where it nests deeper."""
    if not depth:
        raise RecursionError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    if isinstance(value, dict):
        return {name: change_text(each, change, depth - 1) for name, each in value.items()}
    if isinstance(value, list):
        return [change_text(each, change, depth - 1) for each in value]
    return change(value) if isinstance(value, str) else value


def fill_random(value: Any) -> Any:
    """A copy of the value, its placeholders replaced by fresh integers in 0 … 2³²-1, as text where they are in text."""

    def fill(text: str) -> str | int:
        whole = text == RANDOM_INT
        return (
            random.getrandbits(32)
            if whole
            else re.sub(RANDOM_INT, lambda _: str(random.getrandbits(32)), text)
        )

    return change_text(value, fill)


def read_graph(graph: Any) -> Graph:
    """The graph, random numbers filled in, if ComfyUI can be asked to run it: it answers some of the rest with 500."""
    if not isinstance(graph, dict):
        raise ValueError("has to be an object of nodes in ComfyUI's API format, and no text")
    if isinstance(graph.get("nodes"), list):
        message = "the workflow is in the editor's own format; in ComfyUI, use Workflow > Export (API) and send that"
        raise invalid(message, "editor_format")
    for node_id, node in graph.items():
        kind = node.get("class_type") if isinstance(node, dict) else None
        if not isinstance(kind, str) or not 0 < len(kind) < 1000:
            hint = (
                "; of a body for ComfyUI's /prompt, send what is in its prompt"
                if node_id == "prompt"
                else ""
            )
            raise ValueError(
                f"is not in API format: node {node_id!r} has to have a class_type (a string){hint}"
            )
        if not isinstance(node.get("inputs"), dict):
            raise ValueError(
                f"is not in API format: node {node_id!r} has to have inputs (an object)"
            )
    return {node_id: fill_random(node) for node_id, node in graph.items()}


REQUEST_ID_WORDS = (
    "a string of 1 to 128 characters out of A-Z a-z 0-9 . _ - and not start with a dot"
)
BUCKET_WORDS = (
    "the name of a bucket, 3 to 255 of A-Z a-z 0-9 . _ -"  # an ARN would choose another endpoint
)
GROUPS = {"s3": read_object, "webhook": read_object}
OVERRIDES = {  # field of a request: the setting that it is over
    **{
        f"s3.{name}": f"s3_{name}"
        for name in ("access_key_id", "secret_access_key", "endpoint_url", "bucket_name", "region")
    },
    **{f"webhook.{name}": f"webhook_{name}" for name in ("url", "timeout", "secret")},
    "comfy_org_api_key": "comfy_org_api_key",
}
FIELDS: dict[str, Reader] = {  # of a request's input
    "request_id": matching(
        r"(?!\.)[A-Za-z0-9._-]{1,128}", REQUEST_ID_WORDS
    ),  # it becomes a part of an S3 key
    "modifier": read_text,
    "modifications": lambda value: fill_random(read_object(value)),
    "workflow_json": read_graph,
    "webhook.extra_params": read_object,
    "return_outputs_as_base64": read_flag,
    "output_format": matching("webp|jpeg", "webp or jpeg"),
    "output_quality": number(1, 100, int),
    "accept": read_text,
    "prefer": read_text,
    **{
        name: Settings.__dataclass_fields__[setting].metadata["read"]
        for name, setting in OVERRIDES.items()
    },
    "s3.bucket_name": matching(r"[A-Za-z0-9._-]{3,255}", BUCKET_WORDS),
}


def read_job(job: Job) -> None:
    """Fills the job with what its request asks for, request over environment; 400 where a rule is broken."""
    request, job.request = (
        job.request,
        {},
    )  # which may be large, and is not needed while the job waits
    given = {name: value for name, value in request["input"].items() if "." not in name}
    job.request_id = str(uuid.uuid4())
    try:
        vars(job).update(
            read_fields(given, {"request_id": FIELDS["request_id"]})
        )  # a refusal has it already
        for group, inner in read_fields(given, GROUPS).items():
            given |= {f"{group}.{name}": value for name, value in inner.items()}
        known = read_fields(given, FIELDS)
    except ValueError as error:
        raise invalid(str(error)) from None
    unknown = [
        name
        for name in given
        if given[name] not in BLANK and name not in FIELDS and name not in GROUPS
    ]
    unknown += [name for name in request["input"] if "." in name]
    beside = [f"{name}, beside input," for name in request if name in FIELDS or name in GROUPS]
    job.warnings = [
        f"{name:.50} is no field of a request; it was ignored" for name in sorted(unknown) + beside
    ]
    if "modifications" in known and "workflow_json" in known and "modifier" not in known:
        raise invalid(
            "modifications go with a modifier; with workflow_json, put the values into the workflow itself"
        )
    if ("modifier" in known) == ("workflow_json" in known):
        given_are = "both" if "modifier" in known else "neither"
        misspelt = f"; unknown: {', '.join(unknown[:5]):.200}" if unknown else ""
        raise invalid(
            f"give exactly one of modifier and workflow_json in input, not {given_are}{misspelt}"
        )
    _override(job, {OVERRIDES[name]: known.pop(name) for name in OVERRIDES if name in known})
    job.workflow, job.extra_params = (
        known.pop("workflow_json", {}),
        known.pop("webhook.extra_params", {}),
    )
    job.return_outputs_as_base64 = not job.settings.s3_bucket_name
    vars(job).update(known)
    job.accept = media_range(job.accept)
    if job.accept != EVENT_STREAM:
        job.on_event = None
    if not job.settings.webhook_url and job.is_async:
        raise invalid("Prefer: respond-async needs a webhook: give webhook.url, or set WEBHOOK_URL")
    if not job.settings.webhook_url and (
        job.extra_params or {"webhook_timeout", "webhook_secret"} & job.chosen
    ):
        job.warnings.append("no webhook is sent: neither webhook.url nor WEBHOOK_URL is set")


def _override(job: Job, own: dict[str, Any]) -> None:
    """Request over environment, field by field, except that keys come in pairs and secrets stay with their server."""
    settings = job.settings
    job.chosen = {name for name, value in own.items() if value != getattr(settings, name)}
    if ("s3_access_key_id" in own) != ("s3_secret_access_key" in own):
        raise invalid(
            "s3.access_key_id and s3.secret_access_key come in pairs: give both or neither"
        )
    if "webhook_url" in job.chosen:
        own = {"webhook_secret": b"", **own}
    job.settings = replace(settings, **own)
    if any(name.startswith("s3_") for name in own) and not job.settings.s3_bucket_name:
        raise invalid("s3 needs a bucket: give s3.bucket_name, or set S3_BUCKET_NAME")
    if "s3_access_key_id" not in own and "s3_endpoint_url" in job.chosen:
        raise invalid("s3.endpoint_url needs its own s3.access_key_id and s3.secret_access_key")
    if "s3_bucket_name" in job.chosen and not job.settings.s3_access_key_id:
        raise invalid(
            "s3.bucket_name needs s3.access_key_id and s3.secret_access_key: this worker has no keys for it"
        )


def media_range(accept: str) -> str:
    """The first range of an Accept header that the worker can answer with, whatever its weight; else JSON's."""
    for each in accept.lower().split(","):
        name = each.partition(";")[0].strip()
        if name in ("*/*", JSON):
            break
        if name in (EVENT_STREAM, BYTES) or re.fullmatch(r"(image|video|audio)/[\w.+*-]+", name):
            return name
    return JSON


def seeds(graph: Graph) -> dict[str, int]:
    """Each node's literal seed, as it is run, by node id."""
    found = {
        id: node["inputs"].get("seed", node["inputs"].get("noise_seed"))
        for id, node in graph.items()
    }
    return {id: seed for id, seed in found.items() if isinstance(seed, int)}


# Addresses and inputs #################################################################################################

CHUNK_BYTES = 1 << 16
KEEP_SECONDS = 30  # ComfyUI closes a connection that has been idle for 75
INPUT_SECONDS = 60  # without a byte of an input file
MAX_REDIRECTS = 5
AT_ONCE = 4  # files of one job on their way
SOURCE = re.compile(
    r"(?i)https?://|data:"
)  # what an input that names a file begins with, if it is to be fetched
MAGIC = re.compile(  # what the formats that ComfyUI loads begin with, by their extension
    rb"(?P<png>\x89PNG)|(?P<jpg>\xff\xd8\xff)|(?P<gif>GIF8)|(?P<bmp>BM.{4}\0{4})|(?P<tiff>II\*\0|MM\0\*)"
    rb"|(?P<webp>RIFF.{4}WEBP)|(?P<wav>RIFF.{4}WAVE)|(?P<avi>RIFF.{4}AVI )|(?P<avif>.{4}ftypavi)|(?P<mov>.{4}ftypqt)"
    rb"|(?P<m4a>.{4}ftypM4A)|(?P<mp4>.{4}ftyp)|(?P<webm>\x1aE\xdf\xa3)|(?P<flac>fLaC)|(?P<ogg>OggS)"
    rb"|(?P<mp3>ID3|\xff[\xfb\xf3\xf2])|(?P<glb>glTF)",
    re.DOTALL,
)
V6_PUBLIC = ipaddress.ip_network("2000::/3")  # all that IANA has given out
V4_IN_V6 = [
    ipaddress.ip_network(each) for each in ("::ffff:0:0/96", "64:ff9b::/96")
]  # mapped, and NAT64's
SPECIAL = "192.0.0.0/24 192.88.99.0/24 224.0.0.0/4 2001::/23 2002::/16 3fff::/20"  # that is_global lets through
SPECIAL_RANGES = [ipaddress.ip_network(each) for each in SPECIAL.split()]


def is_public(address: str) -> bool:
    """Whether the IP address is one of the public Internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in each for each in V4_IN_V6):
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    is_routed = ip.is_global and (ip.version == 4 or ip in V6_PUBLIC)
    return is_routed and not any(ip in each for each in SPECIAL_RANGES)


def public_places(host: str, port: int) -> list[Any]:
    """The socket addresses of the host; PermissionError where one of them is not public."""
    places = [each[4] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for place in places:
        if not is_public(str(place[0])):
            raise PermissionError(
                f"{host} leads to {place[0]}, and URLs in requests may lead to public addresses only"
                " (the operator can lift this with ALLOW_PRIVATE_ADDRESSES=true)"
            )
    return places


def check_public(name: str, url: str, has_time: bool) -> None:
    """400 where the URL leads to an address that is not public, or nowhere, unless it `has_time` to lead to one."""
    parts = urllib.parse.urlsplit(url)
    try:
        public_places(parts.hostname or "", parts.port or 443)
    except (OSError, UnicodeError) as error:
        if isinstance(error, PermissionError) or not has_time:
            raise invalid(f"{name}: {error}") from None


def _connect_publicly(address: tuple[str, int], timeout: float, *_: Any) -> socket.socket:
    """As socket.create_connection, to what was checked: a second look-up could lead elsewhere."""
    for place in public_places(*address):
        with contextlib.suppress(OSError):
            return socket.create_connection(place[:2], timeout)
    raise ConnectionError(f"{address[0]} does not answer")


class WholeResponse(http.client.HTTPResponse):
    """One that notices when its body is cut short, which `read` with a size ends in silence otherwise."""

    def read(self, amt: int | None = None) -> bytes:
        """At most `amt` bytes, or all that is left; raises ConnectionError or http.client.IncompleteRead."""
        chunk = super().read(amt)
        if amt is not None and len(chunk) < amt and self.length:
            raise ConnectionError(f"the answer ended {self.length} bytes early")
        return chunk


def connect(url: str, seconds: float, is_public_only: bool = False) -> http.client.HTTPConnection:
    """A connection to the URL's server, made directly, whatever proxy the environment names; raises CONNECTION_LOST."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port or kind.default_port, timeout=seconds)
    connection.response_class = WholeResponse
    if is_public_only:
        connection._create_connection = _connect_publicly  # type: ignore[attr-defined]  # TLS comes on top of it
    connection.connect()
    return connection


Kept = list[
    tuple[float, http.client.HTTPConnection]
]  # connections to one server, and when each was used


@contextlib.contextmanager
def request(
    url: str,
    seconds: float,
    body: bytes | Iterable[bytes] | None = None,
    headers: Mapping[str, str] = {},
    kept: Kept | None = None,
    is_public_only: bool = False,
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET, or where there is a body a POST, whatever its status; redirects are not followed.

    body: JSON, or pieces of what the headers describe. `kept` lends a connection, if it has one, and gets it back:
    ComfyUI takes 0.2 ms to accept a new one.
    """
    parts = urllib.parse.urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"User-Agent": f"ComfyUI-PyWorker/{__version__}", **headers}
    if isinstance(body, bytes):  # sent in pieces: a time-out covers all that is sent at once
        headers |= {"Content-Type": JSON, "Content-Length": str(len(body))}
        body = io.BytesIO(body)
    connection = _reuse(kept or [], seconds) or connect(url, seconds, is_public_only)
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        yield response
        if kept is not None and response.length == 0 and not response.will_close:
            kept.append((time.monotonic(), connection))
            stack.pop_all()


def _reuse(kept: Kept, seconds: float) -> http.client.HTTPConnection | None:
    with contextlib.suppress(IndexError):
        used_at, connection = kept.pop()
        if connection.sock and time.monotonic() - used_at < KEEP_SECONDS:
            connection.sock.settimeout(seconds)
            return connection
    return None


@contextlib.contextmanager
def _open(source: str, is_public_only: bool) -> Iterator[Any]:
    if source[:5].lower() == "data:":
        head, _, data = source.partition(",")
        if head.endswith(";base64") and not re.fullmatch(
            r"[A-Za-z0-9+/=%\s]*", data
        ):  # the rest would be left out
            raise ValueError("its base64 has other characters in it")
        yield urllib.request.DataHandler().data_open(urllib.request.Request(source))
        return
    for _ in range(MAX_REDIRECTS + 1):
        if not is_url(source):
            raise ValueError(f"it is not {URL_WORDS}")
        with request(source, INPUT_SECONDS, is_public_only=is_public_only) as answer:
            if answer.status == 200:
                yield answer
                return
            if answer.status not in (301, 302, 303, 307, 308):
                raise ValueError(f"its server answered with {answer.status}")
            source = urllib.parse.urljoin(source, answer.headers.get("Location", ""))
    raise ValueError("it redirects too often")


def fetch(job: Job, source: str) -> tuple[BinaryIO, str]:
    """The file behind an http(s) URL or a data: URI, on disk, and a name for it: its SHA-256 and an extension.

    Raises JobError: input_unavailable, also above MAX_INPUT_BYTES, or the error of `job.stop`.
    """
    limit = job.settings.max_input_bytes
    file, digest = tempfile.TemporaryFile(), hashlib.sha256()  # noqa: SIM115
    shown = re.sub(
        "//[^/]*@", "//", re.split("[?,]", source)[0]
    )  # without passwords, signatures and data
    try:
        with _open(source, not job.settings.allow_private_addresses) as answer:
            for chunk in iter(
                lambda: b"" if job.stopped or file.tell() > limit else answer.read(CHUNK_BYTES), b""
            ):
                digest.update(chunk)
                file.write(chunk)
            mimetype = answer.headers.get_content_type()
        if job.stopped:
            raise job.stopped
        if file.tell() > limit:
            raise ValueError(f"it has more than the {limit} bytes of MAX_INPUT_BYTES")
        if mimetype == "text/html" or not file.tell():
            raise ValueError("it is a web page, and no file" if file.tell() else "it is empty")
    except (*CONNECTION_LOST, ValueError) as error:
        raise invalid(
            f"the input {shown:.200} cannot be had: {error}", "input_unavailable"
        ) from None
    file.seek(0)
    return file, digest.hexdigest() + _extension(file.read(16), mimetype, shown)


def _extension(head: bytes, mimetype: str, url: str) -> str:
    if found := MAGIC.match(head):
        return f".{found.lastgroup}"
    told = mimetypes.guess_extension(mimetype) if mimetype != "application/octet-stream" else None
    return told or "".join(re.findall(r"(?a)\.\w{1,12}$", url))


def at_once(action: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """What the action makes of each item, a few of them at a time; raises the error of the first that fails."""
    if len(items) < 2:
        return [action(each) for each in items]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(action, items))


# ComfyUI ##############################################################################################################

OLDEST_COMFYUI = (0, 3, 45)  # July 2025: the first one that lets the caller choose the prompt id
HTTP_SECONDS = (
    60  # for an answer of ComfyUI, which lists huge model folders while it checks a graph
)
PROBE_SECONDS = 0.8  # below the one second that Kubernetes grants a probe
PROBE_EVERY_SECONDS = 1
FLAP_SECONDS = 10  # a failure shorter than this is not worth taking a worker out of rotation
RECONNECT_SECONDS = 0.5
SILENCE_SECONDS = 10  # without a message for so long, history and queue are looked up
LOOK_UP_TIMEOUT_SECONDS = 10  # a ComfyUI that keeps silent for so long counts as away
LOOK_UP_SECONDS = 1  # between look-ups of a prompt that no connection tells about
FAULT = re.compile(  # the errors after which, in the words of CUDA's documentation, the process must be relaunched
    r"(CUDA|HIP) error: (an illegal|device-side assert|unspecified launch|misaligned|invalid program counter|hardware"
    r"|the launch timed|uncorrectable|operation not supported on global)|.* error: \w+_EXECUTION_FAILED"
)
FILE = {
    "filename": "",
    "subfolder": "",
    "type": "output",
}  # what names a file to ComfyUI, and the defaults
HINTS = {  # by the type of ComfyUI's refusal
    "prompt_no_outputs": "; add an output node that saves, such as SaveImage, and connect it",
    "invalid_prompt": "; check the spelling, or install the custom nodes that bring it",
}


@contextlib.contextmanager
def understanding() -> Iterator[None]:
    """Turns what reading an answer of unknown shape raises into the 502 comfyui_error."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise odd_answer(f"with something that makes no sense: {error!r}") from None


def odd_answer(words: str) -> JobError:
    """An answer of ComfyUI that no worker can use."""
    return JobError(
        502, "comfyui_error", f"ComfyUI answered {words}; is it ComfyUI, and what does its log say?"
    )


class ComfyUI:
    """Everything that speaks to ComfyUI. One prompt is run at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = settings.comfyui_api_base.rstrip("/")
        self._about: dict[str, Any] = {
            "url": self.url,
            "version": None,
            "device": None,
            "vram_free": None,
        }
        self._classes: dict[
            str, dict[str, Any]
        ] = {}  # their inputs, asked for once in ComfyUI's life
        self._kept: Kept = []
        self._socket: websocket.WebSocket | None = None
        self._client_id = ""  # of the websocket's connection; empty while there is none
        self._job: Job | None = None
        self._told_at = 0.0
        self._was_up = False
        self._failing_since = 0.0  # 0: it is in order
        self._fault = ""  # the prompt that broke the GPU
        self._probed_at = float("-inf")
        self._probing = threading.Lock()

    # what the platform asks

    def state(self) -> str:
        """'starting', 'ready', 'unreachable' or 'faulted', from what is known: nothing is asked."""
        if not self._was_up or self._fault:
            return "faulted" if self._fault else "starting"
        # a job that runs on a live websocket is proof enough
        return (
            "unreachable"
            if self._away() > FLAP_SECONDS and not (self._job and self._client_id)
            else "ready"
        )

    @property
    def is_beyond_hope(self) -> bool:
        """Whether only a restart will help: its GPU is broken, or it has been away longer than any job waits for it."""
        is_gone = (
            self._was_up
            and not self._client_id
            and self._away() > self.settings.comfyui_return_timeout
        )
        return bool(self._fault) or is_gone

    def _away(self) -> float:
        return time.monotonic() - self._failing_since if self._failing_since else 0

    def _note_failure(self) -> float:
        """Since when ComfyUI has been away, which is now if it was not before."""
        self._failing_since = since = self._failing_since or time.monotonic()
        return since

    def describe(self) -> dict[str, Any]:
        """url, version, device and vram_free (bytes), asked for once a second at most, for all who probe."""
        with self._probing:
            if time.monotonic() - self._probed_at >= PROBE_EVERY_SECONDS:
                try:
                    self._ask_about(PROBE_SECONDS)
                except (*CONNECTION_LOST, JobError):
                    self._note_failure()
                self._probed_at = time.monotonic()
        return self._about

    @understanding()
    def _ask_about(self, seconds: float) -> None:
        stats = self._get("/system_stats", seconds)
        version, device = stats["system"].get("comfyui_version"), stats["devices"][0]
        about = {
            "version": version,
            "device": device.get("name"),
            "vram_free": device.get("vram_free"),
        }
        self._about = {"url": self.url, **about}

    def clear_cache(self) -> None:
        """Has ComfyUI forget what it has made, and unload its models."""
        with contextlib.suppress(
            *CONNECTION_LOST
        ):  # of one that has died there is nothing to clear
            self._exchange("/free", {"free_memory": True})

    # the websocket

    def listen(self) -> None:
        """Keeps the websocket connected and drained, for ever."""
        pause, trouble, limit, is_given_up = (
            threading.Event(),
            "",
            self.settings.comfyui_return_timeout,
            False,
        )
        while True:
            try:
                self._follow()
            except (
                Exception
            ) as error:  # whatever a server sends, somebody has to listen to the next one
                verb = "lost the connection to" if self._client_id else "cannot reach"
                if self._client_id or str(error) != trouble:
                    log.warning("%s ComfyUI: %s", verb, error)
                self._failing_since = (
                    0 if self._client_id else self._failing_since
                )  # by a probe that was slow
                self._client_id, trouble = "", str(error)
                self._kept.clear()
                self._note_failure()
                self._tell(self._job, "connection_lost")
                if self.is_beyond_hope and not is_given_up and not self._fault:  # which was told of
                    log.error("WORKER_ERROR: ComfyUI is not back in order after %g s", limit)
                is_given_up = self.is_beyond_hope
            pause.wait(RECONNECT_SECONDS)  # nobody tells when a server comes up

    def _follow(self) -> None:
        with contextlib.closing(self._connect()) as connection:
            for frame in iter(connection.recv, ""):
                self._hear(
                    json.loads(frame) if isinstance(frame, str) else {}
                )  # bytes are a preview
        raise ConnectionError("ComfyUI closed the websocket")

    def _hear(self, message: Any) -> None:
        """Passes on what the job has to know: waking its thread for every message took 4 % of a short job's time."""
        with contextlib.suppress(
            AttributeError, KeyError, TypeError
        ):  # custom nodes send what they like
            job, kind, about = self._job, str(message["type"]), message["data"]
            if job and about["prompt_id"] == job.prompt_id:
                matters = (
                    kind in ("execution_start", "execution_error") or about.get("node", "") is None
                )
                # the rest shows now and then that the connection lives
                if (
                    matters
                    or job.on_event
                    or time.monotonic() - self._told_at > SILENCE_SECONDS / 2
                ):
                    self._tell(job, kind, about)

    def _connect(self) -> websocket.WebSocket:
        """Opens a connection with an id of its own: ComfyUI can silence a second one with the id of a lost first."""
        self._ask_about(HTTP_SECONDS)
        version, client_id = str(self._about["version"]), uuid.uuid4().hex
        # websocket-client takes a proxy from the environment unless it is handed a connected socket
        raw = connect(self.url, HTTP_SECONDS).sock
        address = f"ws{self.url[4:]}/ws?clientId={client_id}"
        made = websocket.create_connection(
            address, socket=raw, skip_utf8_validation=True, suppress_origin=True
        )
        made.recv()  # ComfyUI knows the client id once it has sent its first status
        made.settimeout(None)
        if self._fault and not self._get(f"/history/{self._fault}"):  # it has restarted
            self._fault = ""
        self._socket, self._client_id, self._was_up, self._failing_since = made, client_id, True, 0
        self._classes.clear()
        self._tell(self._job, "connected")
        log.info(
            "WORKER_READY: connected to ComfyUI %s on %s at %s",
            version,
            self._about["device"],
            self.url,
        )
        if [int(part) for part in re.findall(r"\d+", version)[:3]] < [*OLDEST_COMFYUI]:
            log.error(
                "this ComfyUI is too old: update it to 0.3.45 or later, which lets a caller choose the prompt id"
            )
        return made

    def _tell(self, job: Job | None, type: str, about: Any = None) -> None:
        if job:
            self._told_at = time.monotonic()
            job.inbox.put({"type": type, "data": about})

    # running a prompt

    def run(self, job: Job) -> None:
        """Runs the job's workflow to its end, good or bad; `read_history` then has what became of it.

        Raises JobError: workflow_rejected, timeout, cancelled, comfyui_lost, comfyui_error, or the error of `job.stop`.
        """
        self._job = job
        is_owed = False  # a prompt that ComfyUI may have and nobody will wait for
        try:
            for _ in range(2):
                client_id = self._submit(job)
                is_owed = True
                if self._wait(job, client_id):
                    is_owed = False
                    return
                log.warning("job %s: ComfyUI has lost its prompt", job.request_id)
        finally:
            self._job = None
            if is_owed:
                self._stop_prompt(job)
        raise JobError(
            502,
            "comfyui_lost",
            "ComfyUI died twice under this job: it may be the job that kills it",
        )

    def _submit(self, job: Job) -> str:
        """Posts the prompt; returns the id of the client that will be told of it, none where the answer was lost."""
        client_id = self.patiently(job, self._working_client)
        key = (
            {"api_key_comfy_org": job.settings.comfy_org_api_key}
            if job.settings.comfy_org_api_key
            else {}
        )
        about = {"prompt_id": job.prompt_id, "client_id": client_id, "extra_data": key}
        try:
            status, answer = self._exchange("/prompt", {"prompt": job.workflow, **about})
        except CONNECTION_LOST:
            return ""
        finally:
            job.is_submitted.set()
        with understanding():
            if status == 400:
                raise self._rejection(
                    answer["error"], answer.get("node_errors") or {}, job.workflow
                )
            if status != 200 or answer["prompt_id"] != job.prompt_id:
                raise odd_answer(f"POST /prompt with {status}")
            if answer.get("node_errors"):
                dropped = self._complaints(answer["node_errors"], job.workflow)
                warning = f"ComfyUI dropped the outputs that depend on invalid nodes: {dropped}"
                job.warnings += [warning] if warning not in job.warnings else []
        return str(client_id)

    def _working_client(self) -> str:
        if not self._client_id or self._fault:
            raise ConnectionError(
                "its GPU is broken" if self._fault else "its websocket cannot be reached"
            )
        return self._client_id

    def _wait(self, job: Job, client_id: str) -> bool:
        """Whether the prompt has ended; False where ComfyUI lost it with its connection."""
        progress, deadline = Progress(job), float("inf")
        while True:
            # a connection that was lost takes its client's messages with it
            is_told = bool(client_id) and client_id == self._client_id
            pause = SILENCE_SECONDS if is_told else LOOK_UP_SECONDS
            message = job.next_message(max(0, min(pause, deadline - time.monotonic())))
            kind, about = (message["type"], message["data"]) if message else ("silence", {})
            if deadline == float("inf") and (kind == "execution_start" or not is_told):
                deadline = time.monotonic() + (self.settings.job_timeout or float("inf"))
            self._heed(job, progress, kind, about)
            if kind == "executing" and about.get("node", "") is None:
                return True  # it sends this once a prompt has ended and its history is written
            if kind in ("silence", "connection_lost", "connected"):
                found = self.patiently(job, lambda: self._look_up(job))
                if found == "lost" and is_told and client_id == self._client_id:
                    raise JobError(499, "cancelled", "the job was deleted from ComfyUI's queue")
                if found == "ended" and kind == "silence" and is_told and self._socket:
                    self._socket.abort()  # type: ignore[no-untyped-call]  # it did not tell: another one is opened
                if found != "queued":
                    return bool(found == "ended")
            if time.monotonic() > deadline:
                limit = self.settings.job_timeout
                raise JobError(
                    504, "timeout", f"the job took more than the {limit:g} s of JOB_TIMEOUT"
                )

    @understanding()
    def _look_up(self, job: Job) -> str:
        """'ended', with its history in `job.entry`, 'queued' while the prompt is in ComfyUI's queue, else 'lost'."""
        for _ in range(2):  # it may end between the two questions
            job.entry = (
                self._get(f"/history/{job.prompt_id}", LOOK_UP_TIMEOUT_SECONDS).get(job.prompt_id)
                or {}
            )
            if job.entry:
                error = failure(job.entry)
                self._note_fault(job, error.details.get("exception_message", "") if error else "")
                return "ended"
            queued = self._get("/queue", LOOK_UP_TIMEOUT_SECONDS)
            if any(item[1] == job.prompt_id for items in queued.values() for item in items):
                return "queued"
        return "lost"

    def read_history(self, job: Job) -> None:
        """Looks up, without the GPU, what has become of a job that has run; output_missing if ComfyUI forgot it."""
        if not job.entry and self.patiently(job, lambda: self._look_up(job)) != "ended":
            raise JobError(502, "output_missing", "ComfyUI died with the job's history")
        if (
            key := job.settings.comfy_org_api_key
        ):  # partner nodes are given it, and may show it under any name
            told = change_text(job.entry, lambda text: text.replace(key, "***"))
            job.entry = {**told, "outputs": job.entry.get("outputs")}  # whose names have to stay

    def _heed(self, job: Job, progress: Progress, kind: str, about: dict[str, Any]) -> None:
        """Heeds what ComfyUI tells of a running job; what makes no sense costs no job."""
        with contextlib.suppress(JobError, *CONNECTION_LOST), understanding():
            if kind == "execution_error":
                self._note_fault(job, about["exception_message"])
            if kind == "execution_cached" and job.on_event:
                items = self._get("/queue")["queue_running"]
                progress.begin(
                    [id for item in items if item[1] == job.prompt_id for id in item[4]],
                    about["nodes"],
                )
            if kind == "progress_state" and job.on_event:
                progress.update(about["nodes"])

    def _note_fault(self, job: Job, message: str) -> None:
        if FAULT.match(message) and self._fault != job.prompt_id:
            log.error(
                "WORKER_ERROR: job %s has broken the GPU; nothing runs until ComfyUI restarts",
                job.request_id,
            )
            self._fault = job.prompt_id
            self._note_failure()

    def _stop_prompt(self, job: Job) -> None:
        """Takes the prompt off ComfyUI: out of its queue, or off the GPU."""
        for _ in range(1 if self._failing_since else 3):
            with contextlib.suppress(*CONNECTION_LOST, JobError):
                self._exchange("/queue", {"delete": [job.prompt_id]}, LOOK_UP_TIMEOUT_SECONDS)
                # looked up first: versions before the targeted form interrupt whoever runs
                if self._look_up(job) == "queued":
                    self._exchange(
                        "/interrupt", {"prompt_id": job.prompt_id}, LOOK_UP_TIMEOUT_SECONDS
                    )
                return
            threading.Event().wait(RECONNECT_SECONDS)

    def patiently(self, job: Job, action: Callable[[], Any]) -> Any:
        """What the action returns, tried again while ComfyUI is away; comfyui_lost after COMFYUI_RETURN_TIMEOUT."""
        limit, ends = self.settings.comfyui_return_timeout, 0.0
        while True:
            try:
                return action()
            except CONNECTION_LOST as lost:
                ends = ends or self._note_failure() + limit  # since then all jobs wait
                if (left := ends - time.monotonic()) <= 0:
                    message = (
                        f"ComfyUI went away and was not back in order within {limit:g} s: {lost}"
                    )
                    raise JobError(502, "comfyui_lost", message) from None
            job.next_message(
                min(left, LOOK_UP_SECONDS)
            )  # "connected", perhaps, or an order to stop

    # files

    @contextlib.contextmanager
    def open(self, output: Output, preview: str = "") -> Iterator[http.client.HTTPResponse]:
        """Opens one file that ComfyUI's history names, converted where there is a `preview`, such as "webp;90".

        Notes its mimetype and size (bytes) in `output`; raises JobError and CONNECTION_LOST.
        """
        converted = {"preview": preview} if preview else {}
        query = urllib.parse.urlencode({name: output[name] for name in FILE} | converted)
        with request(f"{self.url}/view?{query}", HTTP_SECONDS, kept=self._kept) as response:
            if response.status == 404:
                raise JobError(
                    502, "output_missing", f"{output['filename']} is no longer on ComfyUI's disk"
                )
            if response.status != 200 or response.length is None:
                raise odd_answer(f"{response.status} to {output['filename']}")
            output["mimetype"], output["size"] = (
                response.headers.get_content_type(),
                response.length,
            )
            yield response

    def upload(self, file: BinaryIO, name: str) -> str:
        """Puts the file into ComfyUI's input folder, and returns its name there; 400 if it is too large."""
        size = file.seek(0, os.SEEK_END)
        features = self._exchange("/features")[1]  # older ones have none, and answer 413 at the end
        limit = (
            features.get("max_upload_size", float("inf"))
            if isinstance(features, dict)
            else float("inf")
        )
        file.seek(0)
        part = f'Content-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: {BYTES}'
        head, tail = f"--{name}\r\n{part}\r\n\r\n".encode(), f"\r\n--{name}--\r\n".encode()
        total = len(head) + size + len(tail)
        headers = {
            "Content-Type": f"multipart/form-data; boundary={name}",
            "Content-Length": str(total),
        }
        pieces = itertools.chain([head], iter(lambda: file.read(CHUNK_BYTES), b""), [tail])
        if total <= limit:
            with (
                request(
                    f"{self.url}/upload/image", HTTP_SECONDS, pieces, headers, self._kept
                ) as answer,
                understanding(),
            ):
                if answer.status != 413:
                    return str(json.load(answer)["name"])
        message = f"an input file of {size} bytes is more than ComfyUI takes; start it with a larger --max-upload-size"
        raise invalid(message, "input_unavailable")

    @understanding()
    def is_file(self, class_type: str, name: str) -> bool:
        """Whether that input of a node is a choice among files, and not among ComfyUI's own outputs."""
        if class_type not in self._classes:
            self._classes[class_type] = self._inputs(class_type)
        kind, *more = self._classes[class_type].get(name) or [None]
        options = more[0] if more and isinstance(more[0], dict) else {}
        is_choice = (
            isinstance(kind, list)
            or kind == "COMBO"
            or any(each.endswith("_upload") for each in options)
        )
        return is_choice and options.get("image_folder") != "output"

    # HTTP

    def _exchange(
        self, path: str, body: Any = None, seconds: float = HTTP_SECONDS
    ) -> tuple[int, Any]:
        """The status and the JSON body, None where it is none."""
        data = None if body is None else json.dumps(body).encode()
        with (
            request(self.url + path, seconds, data, kept=self._kept) as response,
            contextlib.suppress(ValueError, RecursionError),
        ):
            self._failing_since = 0 if self._client_id and not self._fault else self._failing_since
            return response.status, json.load(
                response, parse_constant=lambda _: None
            )  # JSON has no NaN
        return response.status, None

    def _get(self, path: str, seconds: float = HTTP_SECONDS) -> Any:
        status, answer = self._exchange(path, None, seconds)
        if status != 200 or not isinstance(answer, dict):
            raise odd_answer(f"GET {path} with {status}")
        return answer

    # what ComfyUI says against a workflow, in words

    def _rejection(
        self, error: dict[str, Any], node_errors: dict[str, Any], graph: Graph
    ) -> JobError:
        general = scrub(f"{error['message']} {error.get('details', '')}".strip()) + HINTS.get(
            error["type"], ""
        )
        message = f"ComfyUI refuses the workflow: {self._complaints(node_errors, graph) or general}"
        return JobError(422, "workflow_rejected", message, node_errors=scrub(node_errors))

    def _complaints(self, node_errors: dict[str, Any], graph: Graph) -> str:
        errors = [
            (id, node["class_type"], error)
            for id, node in node_errors.items()
            for error in node["errors"]
        ]
        listed = [
            f"{kind} (node {id}): {self._complaint(kind, error, graph)}"
            for id, kind, error in errors[:5]
        ]
        return str(scrub("; ".join(listed))) + (
            f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        )

    def _complaint(self, class_type: str, error: dict[str, Any], graph: Graph) -> str:
        details = str(error.get("details", ""))
        if error["type"] == "value_not_in_list":
            name, value = (
                error["extra_info"]["input_name"],
                error["extra_info"].get("received_value"),
            )
            with contextlib.suppress(JobError):  # ComfyUI's own words leave longer lists out
                choices = self.choices(class_type, name)
                listed = ", ".join(choices[:50]) + (
                    f" and {len(choices) - 50} more" if len(choices) > 50 else ""
                )
                is_file = isinstance(value, str) and re.search(r"\.\w{2,12}$", value)
                return f"{name} {value!r} is not {'installed' if is_file else 'a choice'}; there is: {listed or 'none'}"
        if re.search(r"Invalid \w+ file", details):
            return f"{details:.200} (it has to lie in ComfyUI's input folder; or give its URL, http(s):// or data:)"
        if (
            error["type"].startswith("exception_during")
            and details.strip("'") not in graph
            and details[:1] == "'"
        ):
            return f"it is linked to node {details}, which is not in the workflow"
        return f"{error['message']}: {details:.500}".rstrip(": ")

    @understanding()
    def choices(self, class_type: str, name: str) -> list[str]:
        """What ComfyUI offers for that input of a node."""
        # [[choice, …], {…}] or, as newer nodes have it, ["COMBO", {"options": [choice, …]}]
        kind, *more = self._inputs(class_type)[name]
        return [str(each) for each in (kind if isinstance(kind, list) else more[0]["options"])]

    @understanding()
    def _inputs(self, class_type: str) -> dict[str, Any]:
        try:
            about = self._get(f"/object_info/{urllib.parse.quote(class_type, safe='')}")
        except CONNECTION_LOST:
            raise not_ready("unreachable") from None
        if class_type not in about:
            raise JobError(
                422,
                "workflow_rejected",
                f"ComfyUI has no node {class_type}{HINTS['invalid_prompt']}",
            )
        inputs = about[class_type]["input"]
        return {**inputs.get("required", {}), **inputs.get("optional", {})}


class Progress:
    """How far a job is: of the nodes that its accepted outputs depend on, cached ones are done, steps are parts."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._needed: dict[str, bool] = {}  # node id: whether it is cached

    def begin(self, outputs: list[str], cached: list[str]) -> None:
        """Takes the ids of the nodes that the job is run for, and of those that are cached."""
        graph, ahead = self._job.workflow, list(outputs)
        while ahead:
            node_id = ahead.pop()
            if node_id not in self._needed:
                self._needed[node_id] = node_id in cached
                links = () if node_id in cached else graph[node_id]["inputs"].values()
                ahead += [
                    link[0]
                    for link in links
                    if isinstance(link, list) and len(link) == 2 and link[0] in graph
                ]
        self.update({})

    def update(self, nodes: dict[str, Any]) -> None:
        """Takes the states of the nodes that have begun: {id: {"value": …, "max": …, "state": …}}"""
        parts = {id: about["value"] / (about["max"] or 1) for id, about in nodes.items()}
        done = sum(
            1 if is_cached else min(1, parts.get(id, 0)) for id, is_cached in self._needed.items()
        )
        # it never goes back, not even when the job is run again
        self._job.percent = max(self._job.percent, round(100 * done / (len(self._needed) or 1), 1))
        by_state = sorted(nodes.items(), key=lambda each: each[1]["state"] == "running")
        node_id, about = by_state[-1] if by_state else ("", {})
        node_id = about.get(
            "display_node_id", node_id
        )  # the submitted one, where a node expands into others
        node_type = self._job.workflow.get(str(node_id), {}).get("class_type")
        steps = {name: about.get(name) for name in ("value", "max")}
        self._job.tell(
            "progress",
            node_id=node_id or None,
            node_type=node_type,
            **steps,
            percent=self._job.percent,
        )


def is_still(output: Output, entry: dict[str, Any]) -> bool:
    """Whether the file is an image that ComfyUI converts as a whole: of an animation it takes the first frame."""
    animated = entry["outputs"][output["node_id"]].get("animated")
    is_animated = animated is True or (isinstance(animated, list) and True in animated)
    is_image = (
        output["filename"]
        .lower()
        .endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))
    )
    return output["output_type"] == "images" and is_image and not is_animated


@understanding()
def failure(entry: dict[str, Any]) -> JobError | None:
    """What went wrong, as a history entry has it; None for a job that succeeded."""
    status = entry.get("status") or {}
    if status.get("completed"):
        return None
    messages = dict(status["messages"])
    if "execution_interrupted" in messages:
        return JobError(499, "cancelled", "the job was interrupted in ComfyUI")
    names = ("node_id", "node_type", "exception_type", "exception_message")
    about = scrub({name: str(messages["execution_error"].get(name, "")).strip() for name in names})
    message = f"{about['node_type']} (node {about['node_id']}) failed: {about['exception_message']}"
    if "OutOfMemory" in about["exception_type"] or "out of memory" in message.lower():
        return JobError(
            500, "out_of_memory", f"{message}; use a smaller picture, batch or model", **about
        )
    return JobError(500, "execution_failed", message, **about)


@understanding()
def may_be_stale(entry: dict[str, Any]) -> bool:
    """Whether outputs may be of an earlier run, and deleted since; of a lost history nobody knows."""
    return not entry or any(
        about.get("nodes") for kind, about in entry["status"]["messages"] if "cached" in kind
    )


@understanding()
def read_outputs(entry: dict[str, Any], graph: Graph) -> list[Output]:
    """Every file and text of a history entry: nodes in the graph's order, then those that ComfyUI made up itself."""
    outputs: dict[str, Any] = entry.get("outputs") or {}
    order = [id for id in graph if id in outputs] + sorted(outputs.keys() - graph.keys())
    return [
        read
        for id in order
        for kind, items in outputs[id].items()
        for read in _read_items(id, kind, items)
    ]


def _read_items(node_id: str, kind: str, items: Any) -> list[Output]:
    where = {"node_id": node_id, "output_type": kind}
    if kind == "text":
        return [{**where, "value": items}]
    listed = items if isinstance(items, list) else []
    files = [
        item for item in listed if isinstance(item, dict) and item.get("filename")
    ]  # the rest are flags
    return [
        {**{name: str(item.get(name) or FILE[name]) for name in FILE}, **where} for item in files
    ]


_ROOT = r"(?:file:/*|[A-Za-z]:(?=[\\/])|\\\\|/(?!/))"  # of an absolute path: POSIX, Windows, its network, or as a URL
_QUOTED_PATH = re.compile(rf"""(['"]){_ROOT}[^'"]*[/\\]([^'"/\\]+)\1""")  # may have spaces in it
_PATH = re.compile(rf"""(?<![\w./-]){_ROOT}(?:[^/\\\s'"]*[/\\])+([^/\\\s'"]*)""")


def scrub(value: Any) -> Any:
    """ComfyUI's words, fit for an answer: without tracebacks, absolute paths cut to the file's name."""
    if isinstance(value, dict):
        return {scrub(name): scrub(each) for name, each in value.items() if name != "traceback"}
    if isinstance(value, list):
        return [scrub(each) for each in value]
    if isinstance(value, str):
        return _PATH.sub(r"\1", _QUOTED_PATH.sub(r"\1\2\1", value))
    return value


# Delivery #############################################################################################################

SPOOL_BYTES = 1 << 20  # of an owed webhook that are kept in memory; larger ones wait on disk
WEBHOOK_PAUSES_SECONDS = (4, 20, 100, 480)  # between five tries, each 20 % more or less


def deliver(job: Job, outputs: list[Output], comfyui: ComfyUI) -> JobError | None:
    """Puts into `job.outputs` every text, and every file that is no preview, with mimetype, size, and url or data.

    Returns the first failure (upload_failed, output_missing, comfyui_error), once all the rest is delivered.
    """
    job.outputs = [output for output in outputs if output.get("type") != "temp"]
    if not job.outputs and not failure(job.entry):
        made = "only previews (type temp), which are not delivered" if outputs else "no outputs"
        job.warnings.append(f"the job made {made}; use a node that saves, such as SaveImage")
    return _deliver_files(job, comfyui)


def _deliver_files(job: Job, comfyui: ComfyUI) -> JobError | None:
    return next(
        filter(None, at_once(functools.partial(_deliver_file, job, comfyui), job.files)), None
    )


def _deliver_file(job: Job, comfyui: ComfyUI, output: Output) -> JobError | None:
    folder = job.settings.comfyui_install_path
    path = os.path.abspath(
        os.path.join(folder, output["type"], output["subfolder"], output["filename"])
    )
    if folder and os.path.isfile(path):
        output["local_path"] = path
    try:
        comfyui.patiently(job, lambda: _bring(job, comfyui, output))
    except JobError as error:
        return error
    return None


def _bring(job: Job, comfyui: ComfyUI, output: Output) -> None:
    """So that it can be done again when ComfyUI went away over it: what S3 has taken is not sent again."""
    preview = preview_of(job, output)
    try:
        if job.settings.s3_bucket_name and "url" not in output:
            _upload(job, comfyui, output, preview)
    finally:
        if job.return_outputs_as_base64 or "url" not in output:
            _embed(job, comfyui, output, preview)


def _embed(job: Job, comfyui: ComfyUI, output: Output, preview: str) -> None:
    """Puts the file's bytes into the output if they are wanted; mimetype and size always are."""
    limit = job.settings.output_base64_max_bytes
    is_shown = job.accept in (JSON, EVENT_STREAM) or job.settings.webhook_url
    is_wanted = (job.return_outputs_as_base64 and is_shown) or "upload_error" in output
    with comfyui.open(output, preview) as file:
        if is_wanted and output["size"] > limit:
            output["error"] = (
                f"{output['size']} bytes are more than the {limit} of OUTPUT_BASE64_MAX_BYTES; use S3"
            )
        elif is_wanted:
            output["data"] = base64.b64encode(file.read())


def preview_of(job: Job, output: Output) -> str:
    """What ComfyUI's /view is to convert the file to, such as "webp;90"; empty where it stays as it is."""
    wanted = job.output_format and is_still(output, job.entry)
    return f"{job.output_format};{job.output_quality}" if wanted else ""


def delivered_name(output: Output, preview: str) -> str:
    """The file's name, with the extension of what it is converted to."""
    name = output["filename"]
    return f"{os.path.splitext(name)[0]}.{preview.partition(';')[0]}" if preview else name


def choose(job: Job, comfyui: ComfyUI) -> None:
    """Chooses the file whose bytes the client is to have; 406 where none fits, with all of them in the envelope."""
    for output in job.files:
        if fnmatch.fnmatchcase(output["mimetype"], job.accept):
            job.answer_file = output
        elif job.accept in ("image/webp", "image/jpeg") and is_still(output, job.entry):
            job.answer_file, job.output_format = output, job.accept.partition("/")[2]
        if job.answer_file:
            return
    made = ", ".join(output["mimetype"] for output in job.files) or "no file"
    error = JobError(406, "not_acceptable", f"no output is {job.accept}; there is {made}")
    job.accept = JSON
    raise _deliver_files(job, comfyui) or error


def _upload(job: Job, comfyui: ComfyUI, output: Output, preview: str) -> None:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    folders = output["subfolder"].replace("\\", "/").split("/")
    name = delivered_name(output, preview)
    key = "/".join(part for part in (str(job.request_id), *folders, name) if part)
    where = {"Bucket": job.settings.s3_bucket_name, "Key": job.settings.s3_prefix + key}
    # without threads a stream is uploaded in 8 MB of memory instead of 120
    config = TransferConfig(use_threads=False)
    client = s3_client(job.settings, "s3_endpoint_url" in job.chosen)
    try:
        with comfyui.open(output, preview) as file:
            client.upload_fileobj(
                file, *where.values(), {"ContentType": output["mimetype"]}, Config=config
            )
    # the rest: what boto3 trips over in answers that are no S3's, and in redirects without end
    except (BotoCoreError, ClientError, LookupError, RuntimeError, TypeError, ValueError) as error:
        output["upload_error"] = _without_keys(str(error), job.settings)
        message = f"S3 did not take {output['filename']}: {output['upload_error']}"
        raise JobError(502, "upload_failed", message) from None
    output["url"] = client.generate_presigned_url("get_object", where, job.settings.s3_url_expires)
    output.pop("upload_error", None)  # of a try before this one


def s3_client(settings: Settings, is_direct: bool = False) -> Any:
    """A boto3 client for the settings' S3, past any proxy if it is to be `is_direct`; 400 where none can be made."""
    names = (
        "access_key_id",
        "secret_access_key",
        "endpoint_url",
        "region",
        "connect_timeout",
        "connect_attempts",
    )
    return _s3_client(is_direct, *(getattr(settings, f"s3_{name}") or None for name in names))


@functools.lru_cache(maxsize=32)  # making a client takes 100 ms; threads can share it
def _s3_client(
    is_direct: bool,
    key: Any,
    secret: Any,
    endpoint: Any,
    region: Any,
    timeout: float,
    attempts: int,
) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:  # not every worker needs S3
        raise invalid("this worker cannot use S3: its operator has to pip install boto3") from None
    config = Config(
        signature_version="s3v4",
        # with "auto", AWS' presigned URLs lead to us-east-1, whatever the region
        s3={"addressing_style": "path" if endpoint else "virtual"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=timeout,
        read_timeout=timeout,
        proxies={} if is_direct else None,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    region = region or ("us-east-1" if endpoint else None)
    try:
        session = boto3.Session(key, secret)
        client = session.client("s3", region, endpoint_url=endpoint, config=config)
        if session.get_credentials():
            return client
    except (BotoCoreError, ValueError) as error:
        raise invalid(f"the S3 settings cannot be used: {error}") from None
    raise invalid(
        "there are no keys for S3: give s3.access_key_id and s3.secret_access_key, or set them as variables"
    )


def _without_keys(text: str, settings: Settings) -> str:
    for key in filter(None, (settings.s3_secret_access_key, settings.s3_access_key_id)):
        text = text.replace(key, "***")
    return str(scrub(re.sub(r"(?i)(signature=)[\w%]+", r"\1***", text)))


def encode(answer: dict[str, Any]) -> list[bytes]:
    """The answer's JSON in pieces: base64 that the outputs hold as bytes is not copied, and not looked through."""
    files: list[bytes] = []
    mark = uuid.uuid4().hex

    def put_aside(data: bytes) -> str:
        files.append(data)
        return mark

    pieces = json.dumps(answer, default=put_aside).encode().split(mark.encode())
    return [piece for pair in zip(pieces, [*files, b""], strict=True) for piece in pair]


def spooled(pieces: list[bytes]) -> Any:
    """A file of the pieces, on disk where it is large and the disk has room."""
    try:
        file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115
        file.writelines(pieces)
        return file
    except OSError:
        return io.BytesIO(b"".join(pieces))


def post_webhook(job: Job, body: bytes) -> str:
    """One try, signed after the Standard Webhooks specification; "" where it was delivered, else what became of it.

    What begins with "failed" is worth another try.
    """
    settings, timestamp = job.settings, str(int(time.time()))
    headers = {"webhook-id": job.prompt_id, "webhook-timestamp": timestamp}
    if settings.webhook_secret:
        signed = f"{job.prompt_id}.{timestamp}.".encode() + body
        digest = hmac.digest(settings.webhook_secret, signed, "sha256")
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    is_public_only = job.distrusts("webhook_url")
    try:
        # a redirect is no delivery: a signed message goes where it was meant to go, or nowhere
        with request(
            settings.webhook_url, settings.webhook_timeout, body, headers, None, is_public_only
        ) as response:
            status = response.status
    except (
        *CONNECTION_LOST,
        UnicodeError,
    ) as error:  # UnicodeError: of a name that cannot be looked up
        return f"failed: {error}"
    is_passing = status in (408, 429) or status >= 500
    return (
        ""
        if 200 <= status < 300
        else f"{'failed' if is_passing else 'refused'} with status {status}"
    )


def deliver_webhook(job: Job, body: BinaryIO) -> bool:
    """Posts the message until its receiver takes or refuses it, five times at most, over ten minutes or more."""
    pause = threading.Event()
    for seconds in (*WEBHOOK_PAUSES_SECONDS, 0):
        body.seek(0)
        trouble = post_webhook(job, body.read())
        if not trouble.startswith("failed") or not seconds:
            break
        log.warning(
            "the webhook of job %s: %s; it is tried again in about %g s",
            job.request_id,
            trouble,
            seconds,
        )
        pause.wait(seconds * random.uniform(0.8, 1.2))
    if trouble:
        log.error("the webhook of job %s was not delivered: %s", job.request_id, trouble)
    return not trouble


# Worker ###############################################################################################################

TURN: Message = {"type": "turn"}
MOVED: Message = {"type": "moved"}
CUT_SHORT = "the worker had to stop before the job ended"
HEAD_START_SECONDS = (
    0.02  # that the next prompt has at most before the one that has ended is looked up
)
CANCEL_SECONDS = 10  # that cancelled jobs get to be answered before the worker exits
METRICS = {  # of GET /metrics, each after "pyworker_": type, help
    "jobs_total": (
        "counter",
        "Jobs that have ended or were refused, by outcome: completed, or the type of the error.",
    ),
    "cost_total": ("counter", "Cost of the jobs that found a place in the queue: 100 each."),
    "jobs_waiting": ("gauge", "Jobs that wait for the GPU."),
    "jobs_running": ("gauge", "Jobs on the GPU: 0 or 1."),
    "queue_seconds": ("summary", "Time that jobs waited for the GPU."),
    "generation_seconds": ("summary", "Time that jobs had the GPU."),
    "delivery_seconds": ("summary", "Time that the delivery of outputs took."),
    "delivered_bytes_total": (
        "counter",
        "Size of the files that were delivered, to S3 or in the answer.",
    ),
    "webhooks_total": (
        "counter",
        "Webhooks whose delivery has ended, by outcome: delivered or failed.",
    ),
    "comfyui_up": ("gauge", "Whether ComfyUI is in order: 0 or 1."),
}


class Line:
    """The lock around the GPU: the first job runs, the others wait, first ready first served."""

    def __init__(self, max_waiting: int) -> None:
        self._lock = threading.Lock()
        self._max_waiting = max_waiting
        self._is_closed = False
        self.jobs: list[Job] = []

    @contextlib.contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """The job's time on the GPU, entered when its turn comes; 503 without a place, or what `job.stop` was given."""
        with self._lock:
            if self._is_closed:
                raise not_ready("stopping")
            if len(self.jobs) > self._max_waiting and not job.was_accepted:
                raise JobError(
                    503,
                    "queue_full",
                    f"{self._max_waiting} jobs are waiting already; try again later",
                )
            self.jobs.append(job)
            job.was_accepted = True
            self._call_first()
        try:
            with job.timed("queue_ms"):
                job.tell("queued", position=max(1, self.jobs.index(job)))
                while (
                    job.next_message() != TURN
                ):  # the line has moved, or it is old news of a job that is run again
                    job.tell("queued", position=max(1, self.jobs.index(job)))
            job.tell("started")
            yield
        finally:
            with self._lock:
                self.jobs.remove(job)
                job.is_submitted.set()  # or never will be
                self._call_first()
                for each in filter(
                    lambda job: job.on_event, self.jobs[1:]
                ):  # the others need not wake up for it
                    each.inbox.put(MOVED)
        # asked for our history first, ComfyUI would have the GPU wait 0.4 ms longer, which costs short jobs 5 %
        with job.timed("postprocess_ms"):
            for following in self.jobs[:1]:
                following.is_submitted.wait(HEAD_START_SECONDS)

    def _call_first(self) -> None:
        if self.jobs and not self.jobs[0].has_turn:
            self.jobs[0].has_turn = True
            self.jobs[0].inbox.put(TURN)

    def close(self) -> None:
        """Gives every waiting job back and takes no more; the running one goes on."""
        with self._lock:
            self._is_closed = True
            for job in self.jobs[1:]:
                job.stop(
                    JobError(499, "cancelled", CUT_SHORT) if job.is_async else not_ready("stopping")
                )


class Clients:
    """Stops the job of a client that goes away, or only shuts down its sending side: they look the same."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        # only Linux tells of a hang-up while bytes are unread; elsewhere a job runs to its end
        self._poll = select.epoll() if hasattr(select, "epoll") else None
        if self._poll:
            threading.Thread(
                target=self._listen, args=[self._poll], name="hang-ups", daemon=True
            ).start()

    @contextlib.contextmanager
    def watch(self, job: Job) -> Iterator[None]:
        """Stops the job in the block when its client goes, unless a webhook is to hear of it."""
        if not self._poll or not job.connection or job.settings.webhook_url:
            yield
            return
        number = job.connection.fileno()
        self._jobs[number] = job
        self._poll.register(number, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            yield
        finally:
            self._poll.unregister(number)
            del self._jobs[number]

    def _listen(self, poll: Any) -> None:
        while True:
            for number, _ in poll.poll():
                job = self._jobs.get(number)
                if job and _is_gone(number):  # the number may be another connection's by now
                    job.stop(JobError(499, "cancelled", "the client closed its connection"))


def _is_gone(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLRDHUP)
    return bool(poll.poll(0))


class Worker:
    """Takes requests to their answers: the one place that knows the order of things."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._changed = threading.Condition()
        self._under_way = 0  # requests that are not answered yet, webhooks that are owed
        self._counts: dict[str, float] = collections.defaultdict(float)  # of METRICS, by sample
        self.comfyui = ComfyUI(settings)
        self._line = Line(settings.max_queue_size)
        self._clients = Clients()
        self._modifiers = load_modifiers()
        self._stopping = False
        self._started_at = time.monotonic()

    def answer(self, job: Job) -> tuple[int, dict[str, Any]]:
        """Takes the job to its end; returns the HTTP status and the envelope, for failures too."""
        error = self._attempt(job, lambda: read_job(job))
        if not error and job.is_async:
            return self._in_background(job)
        return self._end(job, error or self._attempt(job, lambda: self._process(job)))

    def _attempt(self, job: Job, step: Callable[[], None]) -> JobError | None:
        try:
            step()
        except JobError as error:
            return error
        except (
            Exception
        ):  # a bug of ours must not cost the client its answer, nor the webhook its message
            log.exception("job %s met a bug of the worker", job.request_id)
            return JobError(500, "internal_error", "the worker failed; its log says why")
        return None

    def _in_background(self, job: Job) -> tuple[int, dict[str, Any]]:
        """Answers with 202 as soon as the job has a place in the queue, else with what kept it from one."""
        first: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        queued = {
            **envelope(job, None),
            "status": "queued",
            "message": "queued; the webhook will tell the result",
        }

        def accept(*_: Any) -> None:
            job.on_event = None  # woken for more, 1000 that waited made jobs of 4 ms take 15
            first.put((202, queued))

        job.on_event = accept
        self._spawn(
            "job", lambda: first.put(self._end(job, self._attempt(job, lambda: self._process(job))))
        )
        return first.get()

    def _end(self, job: Job, error: JobError | None) -> tuple[int, dict[str, Any]]:
        answer = envelope(job, error)
        outcome = f"{error.type} ({error.status}): {error.message}" if error else "completed"
        timings = ", ".join(f"{name} {answer['timings'][name]}" for name in (*TIMINGS, "total_ms"))
        log.info(
            "job %s %s; %s", job.request_id, outcome.encode("unicode_escape").decode(), timings
        )
        self._count_job(job, error.type if error else "completed")
        if job.was_accepted and job.settings.webhook_url:
            # a receiver that never answers delays nobody, and costs no memory while its next try is waited for
            body = spooled(encode({**answer, "extra": job.extra_params}))
            owed = replace(
                job,
                workflow={},
                entry={},
                outputs=[],
                answer_file=None,
                on_event=None,
                connection=None,
            )
            self._spawn("webhook", lambda: self._notify(owed, body))
        return error.status if error else 200, answer

    def _process(self, job: Job) -> None:
        """Prepares the job, runs it on the GPU when its turn comes, and delivers what it made."""
        with job.timed("preprocess_ms"):
            if self.state() != "ready":
                self.comfyui.describe()  # what is known may be old, where nobody probes
                if (state := self.state()) != "ready":
                    raise not_ready(state)
            self._prepare(job)
        for attempt in range(
            3
        ):  # a busy ComfyUI may take the second prompt first and clear its cache after it
            try:
                self._run(job)
                break
            except JobError as error:
                if error.type != "output_missing" or attempt == 2 or not may_be_stale(job.entry):
                    raise
                self.comfyui.clear_cache()
                job.prompt_id, job.has_turn = str(uuid.uuid4()), False
        if job.accept not in (JSON, EVENT_STREAM):
            choose(job, self.comfyui)

    def _prepare(self, job: Job) -> None:
        """Builds the workflow, fetches the files that it names, and refuses what would fail after the GPU's work."""
        for name in ("s3_endpoint_url", "webhook_url"):
            if job.distrusts(name):
                check_public(
                    name.replace("_", ".", 1),
                    getattr(job.settings, name),
                    has_time=name == "webhook_url",
                )
        if job.settings.s3_bucket_name:
            s3_client(job.settings, "s3_endpoint_url" in job.chosen)
        if job.modifier:
            self._build(job)
        places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for node in job.workflow.values():
            for name, value in node["inputs"].items():
                if (
                    isinstance(value, str)
                    and SOURCE.match(value)
                    and self.comfyui.is_file(node["class_type"], name)
                ):
                    places.setdefault(value, []).append((node["inputs"], name))
        if not places:  # as for most jobs: there is nothing to watch the client over
            return
        with self._clients.watch(job):
            names = at_once(functools.partial(self._bring_input, job), list(places))
        for source, stored in zip(places, names, strict=True):
            for inputs, name in places[source]:
                inputs[name] = stored

    def _bring_input(self, job: Job, source: str) -> str:
        file, name = fetch(job, source)
        try:
            with file:
                return self.comfyui.upload(file, name)
        except CONNECTION_LOST:
            raise not_ready("unreachable") from None

    def _run(self, job: Job) -> None:
        with self._clients.watch(job), self._line.turn(job), job.timed("generation_ms"):
            self.comfyui.run(job)
        with job.timed("postprocess_ms"):
            self.comfyui.read_history(job)
            undelivered = deliver(job, read_outputs(job.entry, job.workflow), self.comfyui)
        if error := failure(job.entry) or undelivered:
            raise error
        job.tell(
            "progress", **dict.fromkeys(("node_id", "node_type", "value", "max")), percent=100.0
        )

    def _build(self, job: Job) -> None:
        """Has the job's modifier build its workflow."""
        modifiers = self._modifiers
        if not modifiers:
            raise invalid(
                "this worker has no modifiers: modifiers.py is not beside pyworker.py",
                "invalid_modification",
            )
        try:
            job.workflow = read_graph(
                modifiers.build(job.modifier, job.modifications, self.comfyui)
            )
            job.modifications = {}
        except modifiers.InvalidModification as error:
            raise invalid(str(error), "invalid_modification", **error.details) from None
        except ValueError as error:  # of read_graph, or the modifier's own
            log.exception("modifier %s", job.modifier)
            raise JobError(
                500, "internal_error", f"the modifier {job.modifier} built no workflow: {error}"
            ) from None

    def _notify(self, job: Job, body: Any) -> None:
        with body:
            outcome = "delivered" if deliver_webhook(job, body) else "failed"
        self._count(f'webhooks_total{{outcome="{outcome}"}}')

    def _spawn(self, name: str, action: Callable[[], None]) -> None:
        """Runs the action in a thread that a stopping worker waits for."""

        def run() -> None:
            try:
                action()
            finally:
                self.begin(-1)

        self.begin()
        threading.Thread(target=run, name=name, daemon=True).start()

    def begin(self, number: int = 1) -> None:
        """Counts what a stopping worker has to wait for; -1 where it has ended."""
        with self._changed:
            self._under_way += number
            self._changed.notify_all()

    def state(self) -> str:
        """'ready', or why not: 'starting', 'unreachable', 'faulted', 'stopping'."""
        return "stopping" if self._stopping else self.comfyui.state()

    @property
    def modifiers(self) -> list[str]:
        """Their names."""
        return list(self._modifiers.names(self.comfyui)) if self._modifiers else []

    def health(self, is_probe_of_life: bool) -> tuple[int, dict[str, Any]]:
        """The HTTP status and the body of GET /health, or of GET /health/live: 503 only where a restart is needed."""
        comfyui = self.comfyui.describe()
        state, jobs = self.state(), [job.request_id for job in self._line.jobs]
        is_well = not self.comfyui.is_beyond_hope if is_probe_of_life else state == "ready"
        return 200 if is_well else 503, {
            "status": state,
            "running": jobs[0] if jobs else None,
            "queued": len(jobs[1:]),
            "cost": COST,
            "modifiers": self.modifiers,
            "comfyui": comfyui,
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._started_at),
        }

    def _count_job(self, job: Job, outcome: str) -> None:
        self._count(f'jobs_total{{outcome="{outcome}"}}')
        if job.was_accepted:
            self._count("cost_total", COST)
            delivered = [
                output["size"] for output in job.files if "url" in output or "data" in output
            ]
            self._count(
                "delivered_bytes_total", sum(delivered) or (job.answer_file or {"size": 0})["size"]
            )
            for name, timing in (
                ("queue", "queue"),
                ("generation", "generation"),
                ("delivery", "postprocess"),
            ):
                self._count(f"{name}_seconds_sum", job.timings[f"{timing}_ms"] / 1000)
                self._count(f"{name}_seconds_count")

    def _count(self, sample: str, amount: float = 1) -> None:
        with self._changed:
            self._counts[sample] += amount

    def metrics(self) -> str:
        """What has been counted, in Prometheus' text format."""
        jobs = len(self._line.jobs)
        now = {
            "jobs_waiting": max(0, jobs - 1),
            "jobs_running": min(1, jobs),
            "comfyui_up": self.comfyui.state() == "ready",
        }
        lines = []
        for name, (kind, text) in METRICS.items():
            samples = [
                each
                for each in (self._counts | now).items()
                if re.match(rf"{name}(_sum|_count)?(\{{|$)", each[0])
            ]
            lines += [f"# HELP pyworker_{name} {text}", f"# TYPE pyworker_{name} {kind}"]
            lines += [
                f"pyworker_{sample} {float(value)}" for sample, value in samples or [(name, 0)]
            ]
        return "\n".join([*lines, ""])

    def stop(self) -> None:
        """Takes no more jobs; returns once what is under way has ended, or was cancelled after SHUTDOWN_GRACE."""
        self._stopping = True
        self._line.close()
        grace = self.settings.shutdown_grace
        log.info(
            "stopping: %d requests and webhooks under way get %g s (a second signal ends it)",
            self._under_way,
            grace,
        )
        with self._changed:
            if not self._changed.wait_for(lambda: not self._under_way, grace):
                for job in self._line.jobs[:1]:
                    job.stop(JobError(499, "cancelled", CUT_SHORT))
                    self._changed.wait_for(lambda: not self._under_way, CANCEL_SECONDS)
        log.info("stopped with %d requests and webhooks under way", self._under_way)


def load_modifiers() -> Any:
    """The module modifiers.py beside this file; None where there is none."""
    if not os.path.exists(os.path.join(os.path.dirname(os.path.abspath(__file__)), "modifiers.py")):
        return None
    import modifiers

    return modifiers


def envelope(job: Job, error: JobError | None) -> dict[str, Any]:
    """The answer to a request, in the contract's shape."""
    now = time.time()
    answer = {
        "id": job.request_id,
        "status": error.outcome if error else "completed",
        "message": error.message if error else f"outputs: {len(job.outputs)}",
        "output": job.outputs,
        "seeds": seeds(job.workflow),
        "timings": {
            "queued_at_ms": round(job.received_at * 1000),
            **{name: round(value) for name, value in job.timings.items()},
            "completed_at_ms": round(now * 1000),
            "total_ms": round((now - job.received_at) * 1000),
        },
        "comfyui_response": scrub(job.entry) if job.settings.include_comfyui_response else {},
        "warnings": job.warnings,
    }
    return (
        {**answer, "error": {"type": error.type, "message": error.message, **error.details}}
        if error
        else answer
    )


# HTTP #################################################################################################################

CONNECTION_SECONDS = 30  # without a byte on a connection that owes us some
DRAIN_SECONDS = 5  # for a client to see its refusal while it is still sending
READ = ["GET", "HEAD"]
ROUTES = {"/generate/sync": ["POST"], "/health": READ, "/health/live": READ, "/metrics": READ}
PREFERENCE = {"Preference-Applied": "respond-async"}
STATUS_HEADERS = {202: PREFERENCE, 401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
KEEP_ALIVE_SECONDS = (
    15  # between the comments of an event stream; proxies end silent connections after 50 or 60 s
)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Translates between HTTP and the worker, and decides nothing."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = CONNECTION_SECONDS
    disable_nagle_algorithm = True  # a keep-alive client waits 40 ms for each answer otherwise
    wbufsize = 1 << 16  # headers and a small body in one write
    owes_body = False

    def _handle(self) -> None:
        # a head that http.server half understands hides where the next request begins; other defects are of the body
        defects = [each for each in self.headers.defects if "Header" in type(each).__name__]
        malformed = bool(defects) or any(name != name.strip() for name in self.headers)
        lengths = self.headers.get_all("Content-Length", ["0"])
        self.owes_body = malformed or lengths != ["0"] or "Transfer-Encoding" in self.headers
        self.server.worker.begin()
        try:
            if malformed:
                raise invalid("a header of the request is malformed")
            self._route()
        except JobError as error:
            self._answer(error.status, envelope(Job(), error))
        finally:
            self.server.worker.begin(-1)

    def __getattr__(self, name: str) -> Callable[[], None]:
        # http.server looks for do_METHOD; all of them come here, so that an unknown one is answered like any other
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _route(self) -> None:
        worker = self.server.worker
        path = re.sub("^https?://[^/]*", "", self.path).partition("?")[0]
        origin = self.headers.get("Origin")
        # keeps a page in somebody's browser from using a worker that only this browser's machine can reach
        if origin and origin.partition("://")[2] != self.headers.get("Host"):
            raise JobError(
                403, "forbidden_origin", "requests of a page from another origin are refused"
            )
        if path not in ROUTES:
            raise JobError(404, "not_found", f"there is nothing here; there is {', '.join(ROUTES)}")
        if self.command not in ROUTES[path]:
            raise JobError(
                405,
                "method_not_allowed",
                f"{path} takes {' or '.join(ROUTES[path])}",
                allow=ROUTES[path],
            )
        if path.startswith("/health"):
            self._answer(*worker.health(is_probe_of_life=path == "/health/live"))
            return
        wanted, given = (
            f"Bearer {worker.settings.auth_token}",
            self.headers.get("Authorization", ""),
        )
        if worker.settings.auth_token and not hmac.compare_digest(
            wanted.encode(), given.encode("latin-1")
        ):
            raise JobError(
                401,
                "unauthorized",
                "send the worker's token in the header 'Authorization: Bearer <token>'",
            )
        if path == "/metrics":
            self._send(200, "text/plain; version=0.0.4; charset=utf-8", [worker.metrics().encode()])
        else:
            self._generate(worker)

    def _generate(self, worker: Worker) -> None:
        is_included = self.headers.get("X-Include-ComfyUI-Response") in ("1", "true")
        settings = (
            replace(worker.settings, include_comfyui_response=True)
            if is_included
            else worker.settings
        )
        accept, prefer = (
            ", ".join(self.headers.get_all(name, [])) for name in ("Accept", "Prefer")
        )
        stream = EventStream(self)
        job = Job(
            settings=settings,
            connection=self.connection,
            on_event=stream.send,
            accept=accept,
            prefer=prefer,
        )
        job.request = parse_request(self._read_body())
        status, answer = worker.answer(job)
        if stream.is_open:
            stream.end(answer)
        elif job.answer_file:
            self._send_file(job, job.answer_file)
        else:
            self._answer(status, answer)

    def _send_file(self, job: Job, output: Output) -> None:
        comfyui, preview = self.server.worker.comfyui, preview_of(job, output)
        plain = re.sub(r"[^ !#-\[\]-~]", "_", delivered_name(output, preview))
        with contextlib.ExitStack() as stack:
            try:
                file = comfyui.patiently(
                    job, lambda: stack.enter_context(comfyui.open(output, preview))
                )
            except JobError as error:
                self._answer(error.status, envelope(job, error))
                return
            headers = {"Content-Type": output["mimetype"], "Content-Length": str(output["size"])}
            headers |= {
                "Content-Disposition": f'inline; filename="{plain}"',
                "X-Request-Id": str(job.request_id),
            }
            self.send_head(200, headers)
            shutil.copyfileobj(file, self.wfile)
            self.wfile.flush()

    def _read_body(self) -> bytes:
        lengths = set(self.headers.get_all("Content-Length", []))
        limit = self.server.worker.settings.max_body_bytes
        if not lengths or "Transfer-Encoding" in self.headers:
            raise JobError(
                411, "length_required", "send the body with a Content-Length, not in chunks"
            )
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", text := lengths.pop()):
            raise invalid("Content-Length has to be one number")
        length = int(text)
        if length > limit:
            raise JobError(
                413, "body_too_large", f"the body has {length} bytes; MAX_BODY_BYTES allows {limit}"
            )
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError("the client went away before its request was complete")
        self.owes_body = False
        return body

    def handle_expect_100(self) -> bool:
        """Has the body come only once it is wanted, in _read_body: a refusal is to be seen before it."""
        return True

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        allow = {"Allow": ", ".join(answer["error"]["allow"])} if status == 405 else {}
        # the line's end is for who reads it in a terminal
        self._send(status, JSON, [*encode(answer), b"\n"], STATUS_HEADERS.get(status, allow))

    def _send(
        self, status: int, mimetype: str, body: list[bytes], headers: Mapping[str, str] = {}
    ) -> None:
        length = str(sum(map(len, body)))
        close = {"Connection": "close"} if self.owes_body or self.close_connection else {}
        self.send_head(
            status, {"Content-Type": mimetype, "Content-Length": length, **headers, **close}
        )
        self.wfile.writelines([] if self.command == "HEAD" else body)
        self.wfile.flush()
        if self.owes_body:
            self._drain()

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        """Everything before the body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _drain(self) -> None:
        """Reads on for a while after a refusal: closing on unread bytes would reset the connection under the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + DRAIN_SECONDS
        self.connection.settimeout(DRAIN_SECONDS)
        while self.rfile.read1(1 << 16) and time.monotonic() < deadline:
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses (a malformed or oversized head), in the shape of every other answer."""
        self.close_connection = self.owes_body = True
        self.request_version = (
            self.protocol_version
        )  # http.server answers a line that it cannot read without a head
        self._answer(
            code,
            envelope(
                Job(), JobError(code, "invalid_request", f"the request cannot be read: {message}")
            ),
        )

    def version_string(self) -> str:
        """The Server header."""
        return f"ComfyUI-PyWorker/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:
        """The log has a line per job; requests are a proxy's to log."""


class EventStream:
    """Server-sent events on a connection. It opens with the first of them, so that refusals stay ordinary answers."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.is_open = False

    def send(self, event: str, about: dict[str, Any]) -> None:
        """Sends one event; a client that has gone is noticed elsewhere."""
        if not self.is_open:
            self.is_open = self._handler.close_connection = True
            # nginx would collect the events
            headers = {
                "Content-Type": EVENT_STREAM,
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
            self._handler.send_head(200, {**headers, "Connection": "close"})
            threading.Thread(target=self._keep_alive, name="keep-alive", daemon=True).start()
        self._write([f"event: {event}\ndata: ".encode(), *encode(about), b"\n\n"])

    def end(self, answer: dict[str, Any]) -> None:
        """Sends the answer as the last event."""
        self.send("result", answer)
        self._ended.set()

    def _keep_alive(self) -> None:
        while not self._ended.wait(KEEP_ALIVE_SECONDS):
            self._write([b": the job is under way\n\n"])

    def _write(self, pieces: list[bytes]) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            try:
                self._handler.wfile.writelines(pieces)
                self._handler.wfile.flush()
            except (
                CONNECTION_LOST
            ):  # a client that has stopped reading may hold up its job once, not again and again
                self._ended.set()


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens, with a thread per connection."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = (
        1024  # connections that arrive together; the kernel's own limit may be lower
    )

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        host = worker.settings.worker_host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, worker.settings.port), Handler)

    def stop(self) -> None:
        """Returns once the worker has come to its end."""
        self.worker.stop()
        self.shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news; anything else is a bug."""
        if not isinstance(sys.exc_info()[1], CONNECTION_LOST):
            log.exception("a connection met a bug of the worker")


# Command line #########################################################################################################


class LogFormatter(logging.Formatter):
    """Keeps the words that engines look for, WORKER_READY and WORKER_ERROR, out of what strangers have us log."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        text = super().format(record)
        return (
            text
            if str(record.msg).startswith("WORKER_")
            else re.sub("WORKER_(?=READY|ERROR)", "WORKER-", text)
        )


def main() -> None:
    """Runs the worker until it is told to stop by SIGTERM or SIGINT; a second signal stops it at once."""
    given = {
        name: value for name, value in vars(_parser().parse_args()).items() if value is not None
    }
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    log.setLevel(logging.INFO)  # and the libraries at their warnings
    # of a modifiers.py that cannot be imported, too
    sys.excepthook = lambda *error: log.critical(
        "WORKER_ERROR: the worker cannot start: %s", error[1], exc_info=error
    )
    try:
        settings = Settings.read({**os.environ, **given})
        server = Server(Worker(settings))
    except ValueError as error:
        sys.exit(f"WORKER_ERROR: {error}")
    except OSError as error:
        sys.exit(
            f"WORKER_ERROR: cannot listen on {settings.worker_host} port {settings.port} (see --port): {error}"
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, functools.partial(_stop, server))
    _fit_the_system()
    log.info("ComfyUI PyWorker %s listens on http://%s:%s", __version__, *server.server_address[:2])
    threading.Thread(target=_warn, args=[settings], name="warnings", daemon=True).start()
    log.info(
        "modifiers: %s",
        ", ".join(server.worker.modifiers) or "none, as modifiers.py is not beside pyworker.py",
    )
    log.info(
        "waiting for ComfyUI at %s; to start one: python main.py in its folder",
        settings.comfyui_api_base,
    )
    threading.Thread(target=server.worker.comfyui.listen, name="websocket", daemon=True).start()
    server.serve_forever()
    logging.shutdown()
    os._exit(0)  # an upload that hangs, in a thread of its pool, would be waited for


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(
        f"  {each.name.upper():26}{each.metadata['help']}"
        + (f" [{each.default}]" if each.default else "")
        for each in fields(Settings)
    )
    parser = argparse.ArgumentParser(
        description="Turns a ComfyUI into an HTTP API: POST /generate/sync runs a workflow.",
        epilog=f"environment:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", dest="WORKER_HOST", help="address to listen on, over WORKER_HOST")
    parser.add_argument("--port", dest="PORT", help="port to listen on, over PORT")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _warn(settings: Settings) -> None:
    """Says what an operator would regret later."""
    if settings.worker_host not in ("127.0.0.1", "::1", "localhost") and not settings.auth_token:
        log.warning(
            "AUTH_TOKEN is not set: whoever reaches %s can use the GPU", settings.worker_host
        )
    if settings.s3_access_key_id and not settings.s3_bucket_name:
        log.warning(
            "S3 keys are set but no S3_BUCKET_NAME: S3 is off for requests that name no bucket"
        )
    for name in ("comfyui_install_path", "workflow_file", "workflows_dir"):
        if not os.path.exists(getattr(settings, name) or "."):
            log.warning("%s leads nowhere: %s", name.upper(), getattr(settings, name))
    try:
        if settings.s3_bucket_name:
            s3_client(settings)  # which the first job need not make then
    except JobError as error:
        log.warning("jobs that use S3 will be refused: %s", error)


def _fit_the_system() -> None:
    """Makes room for many connections and large bodies, where the system lets it."""
    with contextlib.suppress(
        ImportError, ValueError, OSError
    ):  # Linux' usual limit of 1024 is soon reached
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(
        ImportError, AttributeError, OSError, TypeError
    ):  # of a C library that is not glibc
        import ctypes

        # M_MMAP_THRESHOLD: what takes more than this is given back at once. Left alone, glibc raises it to the largest
        # body so far, and each thread keeps the memory of one: 40 owed webhooks of 22 MB held 620 MB instead of 33.
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


def _stop(server: Server, number: int, frame: Any) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: os._exit(1))
    threading.Thread(target=server.stop, name="stop", daemon=True).start()


if __name__ == "__main__":
    main()
