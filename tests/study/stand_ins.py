"""Protocols for tests: the presets themselves with tiny random models, few steps and little data."""

import tomllib
from pathlib import Path
from typing import Any

import tiny
import torch
from PIL import Image

from adapters import toys
from virtual_tryon import judge
from virtual_tryon.study.job import Job
from virtual_tryon.study.protocol import Protocol
from virtual_tryon.study.reading import preset, protocol

PROMPTS = 2


def entries(name: str) -> dict[str, Any]:
    """A preset's TOML as data, cut down to two prompts and two steps."""
    data = tomllib.loads(preset(name).read_text())
    data["training"] |= {"steps": 2, "rank": 2}
    data["drawing"] |= {"steps": 2, "seeds": 1}
    data["data"] |= {"count": 4, "truths": 2} if data["data"]["source"] == "drawn" else {}
    data["prompts"] = {key: prompts[:PROMPTS] for key, prompts in data["prompts"].items()}
    for setting in data["settings"]:
        if setting.get("learn") == "ziplora":
            setting["options"] |= {"steps": 1, "calibration": 1}
        elif "learn" in setting:
            setting["options"] |= {"batches": 1}
    data["sensitivity"] |= {"values": [1.0], "seeds": 1}
    return data


def mini(base: Path, scorer: Path) -> Protocol:
    """The miniature's preset on an untrained base and judge, with a few of its settings."""
    data = entries("mini")
    data["base"]["model"], data["scorer"]["model"] = str(base), str(scorer)
    data["drift"] |= {"prompts": data["drift"]["prompts"][:1], "seeds": 1}
    kept = ("none", "profile", "barca", "weighted", "three_none", "three_sum", "beside", "off_rows", "gates", "mole")
    data["settings"] = [setting for setting in data["settings"] if setting["name"] in kept]
    return protocol(data, "mini", Path(), "mini.toml")


def paper(folder: Path) -> Protocol:
    """The study's preset on a tiny SDXL, a tiny DINOv2 and coloured squares for photographs, with some other methods."""
    data = entries("paper")
    kept = ("sum", "ziplora", "zip_lsq", "ties", "tsv")
    data["settings"] = [s for s in data["settings"] if s.get("family") != "methods" or s["name"] in kept]
    pipe = tiny.pipeline("sdxl")
    pipe.save_pretrained(folder / "sdxl")
    data["drift"] |= {"prompts": data["drift"]["prompts"][:1], "seeds": 1}
    data["base"]["model"] = str(folder / "sdxl")
    data["scorer"]["model"] = str(toys.dinov2(folder / "dinov2"))
    data["training"]["resolution"] = tiny.SIDE
    data["data"]["folder"] = str(folder / "photos")
    for i, concept in enumerate(data["concepts"]):
        photos(folder / "photos" / concept["name"], f"a {concept['identifier']}", 4 * i)
    return protocol(data, "paper", Path(), "paper.toml")


def photos(folder: Path, caption: str, seed: int) -> None:
    folder.mkdir(parents=True)
    for i in range(4):
        toys.picture(seed + i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)


def scorer(folder: Path, resolution: int) -> Path:
    """An untrained judge."""
    torch.manual_seed(0)
    encoder = judge.encoder(resolution).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return judge.save(judge.Judge(encoder=encoder, heads=judge.new_heads(128).eval()), folder)


def job(protocol: Protocol, out: Path, *families: str) -> Job:
    return Job(protocol=protocol, out=out, families=("study", *families))


def pixels(file: Path) -> bytes:
    return Image.open(file).tobytes()
