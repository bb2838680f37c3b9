"""Pushing to the Hub: a server here speaks its API to huggingface_hub's own client, and the card says what is known."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from hypothesis import given, strategies as st
from markdown_it import MarkdownIt

import loramerge as lm
from hub_server import Hub, front_matter, serving
from loramerge.files import hub as downloads
from loramerge.files.storage.texts import visible
from loramerge.merging import model_card, push
from loramerge.merging.markdown import code, fenced, plain
from loramerge.testing import relative_error
from small import small

TOKEN, READER = "hf_secretsecretsecret", "hf_readerreaderreader"
PHRASE, LICENCE = "modelspec.trigger_phrase", "modelspec.license"
PARENT = "---\nlicense: openrail++\nbase_model: stability/sdxl\n---\n"


def saved(path: Path, seed: int, dialect: str = "kohya", **metadata: str) -> Path:
    lora = small(seed=seed, rank=2)
    return lm.save(
        replace(lora, metadata={k.replace("__", "."): v for k, v in metadata.items()}), path, dialect=dialect
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process and its children push to, and in which a parent is."""
    content = saved(tmp_path / "parent.safetensors", 1, modelspec__trigger_phrase="sks person").read_bytes()
    with serving(Hub(writers={TOKEN: ("me", "my-org"), READER: ()})) as served:
        served.add("someone/person", {"person.safetensors": content, "README.md": PARENT.encode()})
        served.add("stability/sdxl", {"README.md": b"---\nlicense: openrail++\n---\n"})
        for name, value in {"HF_ENDPOINT": served.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "ENDPOINT", served.url)  # read from the environment at the first import only
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.chdir(tmp_path)
        yield served


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramerge", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def loaded(repo: str) -> str:
    """The hash of what another process loads from the hub by name."""
    code = f"import loramerge as lm; print(lm.load({repo!r}).sha256)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def merged(folder: Path) -> Path:
    """A merge of a parent on the hub and of a file whose licence nobody names."""
    jersey = saved(folder / "jersey.safetensors", 2, "diffusers-peft")
    both = folder / "both.safetensors"
    done = run("merge", "someone/person", jersey, "-o", both, "-w", "0.7", "-w", "0.5", "--to", "kohya", "-q")
    assert done.returncode == 0, done.stderr
    return both


def test_what_is_pushed_is_loaded_again_with_the_same_bytes_and_a_true_card(hub: Hub, tmp_path: Path) -> None:
    both = merged(tmp_path)
    shown = run("push", both, "my-org/both", "--tag", "text-to-image", "--dry-run")
    assert "my-org/both" not in hub.repos

    done = run("push", both, "my-org/both", "--tag", "text-to-image")

    assert done.returncode == 0, done.stderr
    repo = hub.repos["my-org/both"]
    assert done.stdout.startswith(f"→ my-org/both: {hub.url}/my-org/both/commit/{repo.head()}\n")
    assert repo.files()["both.safetensors"] == both.read_bytes()
    assert loaded("my-org/both") == lm.load(both).sha256
    card = repo.files()["README.md"].decode()
    assert card == shown.stdout
    parent = hub.repos["someone/person"].head()
    assert (
        f"](<{hub.url}/someone/person/tree/{parent}>), `person.safetensors`; weight `0.7`; licence `openrail++ (says its repository)`"
        in card
    )
    assert f"SHA-256 of its tensors `{lm.load(tmp_path / 'parent.safetensors').sha256}`" in card
    assert "`jersey.safetensors`, a file that is not on the Hub; weight `0.5`; licence **unknown**" in card
    assert "The licence of `jersey.safetensors` is unknown" in card
    assert "- `sks person`, of `person.safetensors`" in card
    assert lm.Recipe.of(lm.load(both)).to_toml() in card
    assert front_matter(card) == {
        "library_name": "diffusers",
        "instance_prompt": "sks person",
        "tags": ["diffusers", "lora", "merge", "loramerge", "sdxl", "text-to-image"],
    }
    assert "note: the card names no base model" in done.stdout
    assert "note: the licence of 1 of the LoRAs that it was made from is unknown" in done.stdout
    assert TOKEN not in done.stdout + done.stderr + card

    run("push", both, "my-org/both", "--tag", "text-to-image")

    assert len(repo.commits) == 2  # the first is the Hub's own


def test_a_card_names_the_base_model_that_is_given_or_that_every_parent_has(hub: Hub, tmp_path: Path) -> None:
    both = merged(tmp_path)
    other = hub.repos["someone/person"].files()["person.safetensors"]
    hub.add("someone/other", {"other.safetensors": other, "README.md": PARENT.encode()})
    twice = tmp_path / "twice.safetensors"
    run("merge", "someone/person", "someone/other", "-o", twice, "--to", "kohya", "-q")

    given = front_matter(model_card(both, "me/both", base_model="some/base"))
    inherited = front_matter(model_card(twice, "me/twice"))
    hub.repos["someone/other"].gated = True
    merge = front_matter(model_card(twice, "me/twice"))

    assert (given["base_model"], given["base_model_relation"]) == ("some/base", "adapter")
    assert (inherited["base_model"], inherited["base_model_relation"]) == ("stability/sdxl", "adapter")
    assert (merge["base_model"], merge["base_model_relation"]) == (["someone/person", "someone/other"], "merge")
    assert 'DiffusionPipeline.from_pretrained("some/base")' in model_card(both, "me/both", base_model="some/base")


def test_a_base_model_that_the_file_names_counts_if_the_hub_has_it(hub: Hub, tmp_path: Path) -> None:
    there = saved(tmp_path / "there.safetensors", 3, ss_sd_model_name="stability/sdxl")
    folder = saved(tmp_path / "folder.safetensors", 3, ss_sd_model_name="models/sdxl")

    assert front_matter(model_card(there, "me/a"))["base_model"] == "stability/sdxl"
    assert "base_model" not in front_matter(model_card(folder, "me/a"))


def test_the_licence_in_a_parents_header_is_told_of_the_parent_alone(hub: Hub, tmp_path: Path) -> None:
    free = saved(tmp_path / "free.safetensors", 3, modelspec__license="CC0 1.0")
    person = saved(tmp_path / "person.safetensors", 4)
    both = lm.save(lm.merge([free, person]), tmp_path / "both.safetensors")
    alone = lm.save(lm.merge([free, free]), tmp_path / "alone.safetensors")

    mixed, same = model_card(both, "me/both"), model_card(alone, "me/alone")

    assert "licence `CC0 1.0 (says its header)`" in mixed
    assert "license" not in front_matter(mixed)
    assert {"license": "other", "license_name": "cc0-1.0"}.items() <= front_matter(same).items()
    assert same.count("licence `CC0 1.0 (says its header)`") == 2
    assert front_matter(model_card(both, "me/both", license="openrail++"))["license"] == "openrail++"


def test_a_merge_of_a_merge_lists_the_parents_of_its_parents(hub: Hub, tmp_path: Path) -> None:
    names = [saved(tmp_path / f"{i}.safetensors", i) for i in range(3)]
    first = lm.save(lm.merge(names[:2]), tmp_path / "first.safetensors")
    second = lm.save(lm.merge([first, names[2]]), tmp_path / "second.safetensors")

    card = model_card(second, "me/second")

    assert "\n- `first.safetensors`" in card
    assert "\n  - `0.safetensors`" in card
    assert "\n- `2.safetensors`" in card


HOSTILE = "x\n---\nlicense: mit\n---\n<script>alert(1)</script> [a](javascript:b) ``` | **b** \u202e"


def test_nothing_in_a_header_acts_in_a_card(hub: Hub, tmp_path: Path) -> None:
    entry = {"name": HOSTILE, "sha256": HOSTILE, "source": f"hf://a/b/{HOSTILE}", "metadata": {LICENCE: HOSTILE}}
    record = {"method": HOSTILE, "options": {HOSTILE: HOSTILE}, "weights": HOSTILE, "budget": [1], "rank": {}}
    record |= {"inputs": [entry, entry | {"weight": {HOSTILE: HOSTILE}}, {"metadata": 1, "source": 2}, 3]}
    lora = replace(small(), metadata={PHRASE: HOSTILE, LICENCE: HOSTILE, "loramerge": json.dumps(record)})
    path = lm.save(lora, tmp_path / "x.safetensors", dialect="kohya")

    card = model_card(path, "me/x")

    metadata = front_matter(card)
    assert metadata["instance_prompt"] == " ".join(HOSTILE.split())
    assert metadata["license"] == "other"
    body = card.split("\n---\n", 1)[1]
    tokens = [inner for token in MarkdownIt().parse(body) for inner in (token, *(token.children or ()))]
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_block", "html_inline", "hr", "image"}
    assert all(t.attrGet("href").startswith(hub.url) for t in tokens if t.type == "link_open")
    assert sum(token.type == "heading_open" for token in tokens) == card.count("\n## ") + 1
    assert "\u202e" not in body


STRANGE = st.text() | st.text("`*_<>[]()\\\\&;a#!|~$ \n\u202e")


def shown(markdown: str) -> list[tuple[str, str]]:
    """The parts of a line as a reader of Markdown has them, neighbouring texts as one."""
    children = MarkdownIt().parseInline(markdown)[0].children or []
    texts = "text", "text_special"
    if children and all(token.type in texts for token in children):
        whole = "".join(token.content for token in children).strip()
        return [("text", whole)] if whole else []
    return [(token.type, token.content.strip()) for token in children]


@given(text=STRANGE)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    once = visible(text).strip()

    assert shown(plain(text)) == ([("text", once)] if once else [])
    assert shown(code(text)) == [("code_inline", once)]
    (block,) = MarkdownIt().parse(fenced("toml", text))
    assert (block.type, block.info) == ("fence", "toml")


@pytest.mark.parametrize("dialect", ["kohya", "diffusers-peft", "comfyui"])
def test_a_card_says_what_readers_ignore(hub: Hub, tmp_path: Path, dialect: str) -> None:
    path = lm.save(small(), tmp_path / "x.safetensors", dialect=dialect)

    card = model_card(path, "me/x", base_model="stability/sdxl")

    stops = "diffusers loads nothing, as it stops at the names of UNets. Convert the file first:" in card
    assert stops == (dialect == "comfyui")
    assert ("library_name" in front_matter(card)) == (dialect != "comfyui")
    assert ("ComfyUI ignores the attention of UNets: 1 of 4 layers." in card) == (dialect == "diffusers-peft")


def test_a_peft_adapter_is_pushed_with_its_scale(hub: Hub, tmp_path: Path) -> None:
    folder = lm.save(small(seed=5, alpha=1, rank=4), tmp_path / "adapter", dialect="peft")

    push(folder, "me/adapter")
    push(folder / "adapter_model.safetensors", "me/again")

    names = {"adapter_model.safetensors", "adapter_config.json"}
    assert names <= hub.repos["me/adapter"].files().keys()
    assert names <= hub.repos["me/again"].files().keys()
    assert loaded("me/adapter") == lm.load(folder).sha256
    assert "PeftModel.from_pretrained" in hub.repos["me/adapter"].files()["README.md"].decode()


def test_pictures_are_pushed_and_shown(hub: Hub, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", 1)
    picture = tmp_path / "a b.png"
    picture.write_bytes(b"\x89PNG")

    push(path, "me/x", pictures=[picture], private=True)

    files = hub.repos["me/x"].files()
    assert files["images/a b.png"] == b"\x89PNG"
    assert "![a b](images/a%20b.png)" in files["README.md"].decode()
    assert hub.repos["me/x"].private


def test_another_file_is_replaced_only_on_demand(hub: Hub, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", 1)
    push(path, "me/x")
    before = hub.repos["me/x"].files()
    saved(path, 2)

    with pytest.raises(lm.errors.FileError, match=r"has another x\.safetensors and another README\.md\. .*--overwrite"):
        push(path, "me/x")
    assert hub.repos["me/x"].files() == before
    push(path, "me/x", overwrite=True)

    assert hub.repos["me/x"].files()["x.safetensors"] == path.read_bytes()


def test_a_repository_with_other_loras_is_pointed_out(hub: Hub, tmp_path: Path) -> None:
    hub.add("me/many", {"old.safetensors": b"x"})
    notes: list[str] = []

    push(saved(tmp_path / "x.safetensors", 1), "me/many", noted=notes.append)

    assert any("1 more .safetensors files, so readers must name this one: me/many/x.safetensors" in n for n in notes)


def test_a_commit_in_between_is_never_written_over(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.add("me/x", {"notes.md": b""})
    path = saved(tmp_path / "x.safetensors", 1)
    created = huggingface_hub.HfApi.create_commit

    def late(*args: Any, **options: Any) -> Any:
        repo.commit({"x.safetensors": b"theirs"})
        return created(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)

    with pytest.raises(lm.errors.FileError, match=r"me/x was changed meanwhile\. Way out: push again"):
        push(path, "me/x")
    assert repo.files()["x.safetensors"] == b"theirs"


def refused(path: Path, repo: str = "me/x", **options: Any) -> str:
    with pytest.raises(lm.errors.LoRAMergeError) as found:
        push(path, repo, **options)
    return str(found.value)


def test_a_licence_that_the_hub_does_not_have_is_refused_before_anything_is_sent(hub: Hub, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", 1, modelspec__license="openrail-x")

    for published in (push, model_card):
        with pytest.raises(
            lm.errors.OptionError, match=r"no licence 'openrail-x'\. Did you mean 'openrail.*Way out: other"
        ):
            published(path, "me/x", license="openrail-x")

    assert "me/x" not in hub.repos
    assert front_matter(model_card(path, "me/x", license="other"))["license"] == "other"
    assert {"license": "other", "license_name": "openrail-x"}.items() <= front_matter(model_card(path, "me/x")).items()


def test_a_refusal_says_why_and_never_the_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.safetensors", 1)
    said = {
        "org": refused(path, "my-orgs/x"),
    }
    hub.fails_at = "commit"
    said["fault"] = refused(path, "me/y")
    hub.fails_at = ""
    monkeypatch.setenv("HF_TOKEN", READER)
    said["reader"] = refused(path)
    monkeypatch.setenv("HF_TOKEN", "hf_unknownunknown")
    said["unknown"] = refused(path)
    monkeypatch.delenv("HF_TOKEN")
    said["none"] = refused(path)

    assert "you have no organisation my-orgs to write to. Did you mean 'my-org'? You are in me, my-org." in said["org"]
    assert "stumbled over Bearer … (HTTP 500)" in said["fault"]
    assert said["fault"].endswith("The repository me/y is there now, and is empty.")
    assert "the token may not write to me." in said["reader"] or "no organisation me" in said["reader"]
    assert "the Hub doesn't know the token. Way out: 'hf auth login'" in said["unknown"]
    assert "no token for the Hub was found. Way out: 'hf auth login'" in said["none"]
    for text in said.values():
        assert text.startswith("Can't push to m")
        assert "hf_" not in text
    assert not any(name in hub.repos for name in ("my-orgs/x",))


def test_a_hub_that_does_not_answer_is_named_when_pushing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "x.safetensors", 1)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    assert "Way out: check the network, and http://127.0.0.1:9." in refused(path)

    monkeypatch.setattr(downloads, "unreachable", lambda: "offline (HF_HUB_OFFLINE is set)")
    assert "offline (HF_HUB_OFFLINE is set). Way out: push again when there is a network." in refused(path)


def test_what_is_no_lora_or_no_place_for_one_is_refused_before_anything_is_sent(hub: Hub, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", 1)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:100])
    peft = lm.save(small(), tmp_path / "adapter", dialect="peft")
    os.rename(peft / "adapter_model.safetensors", tmp_path / "y.safetensors")
    os.rename(peft / "adapter_config.json", tmp_path / "y.adapter_config.json")
    (tmp_path / "notes.txt").write_text("")

    assert "broken.safetensors" in refused(broken)
    assert "y.safetensors alone: its scale is in a configuration beside it" in refused(tmp_path / "y.safetensors")
    assert "wanted the name of a repository alone, org/name" in refused(path, "x")
    assert "wanted the name of a repository alone, org/name" in refused(path, "me/x@v1")
    assert "The base model 'sdxl' is not a repository on the Hub" in refused(path, base_model="sdxl")
    assert "Can't show the picture" in refused(path, pictures=[tmp_path / "notes.txt"])
    assert "No such file" in refused(tmp_path / "missing.safetensors")
    assert not hub.requests


@pytest.mark.parametrize(
    ("to", "then", "gives"),
    [
        ("kohya", "kohya", "these tensors again"),
        ("peft", "peft", "these tensors again"),
        ("kohya", "comfyui", "the same LoRA again, in the dialect `kohya`"),
    ],
)
def test_the_command_on_a_card_gives_what_the_card_says(
    to: str, then: str, gives: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parents = [saved(tmp_path / f"{seed}.safetensors", seed, "kohya") for seed in (1, 2)]
    merge = lm.save(lm.merge(parents, weights=[0.7, 0.5]), tmp_path / "merge.safetensors", dialect=to)
    file = merge if then == to else lm.convert(merge, tmp_path / "converted.safetensors", then)

    pushed, card = lm.load(file), model_card(file, "me/merge")

    command, said = re.findall(r"^With the same files, `loramerge (.*?)` gives (.*):$", card, re.MULTILINE)[0]
    assert said == gives
    (tmp_path / "recipe.toml").write_text(card.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
    assert run(*shlex.split(command)).returncode == 0
    made = lm.load(tmp_path / command.rpartition(" ")[2])
    assert made.dialect == to
    assert (made.sha256 == pushed.sha256) == (then == to)
    assert all(relative_error(made[module].delta(), pushed[module].delta()) <= 1e-6 for module in made)
