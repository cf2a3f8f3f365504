"""Every kind of file that is read: how one is made, and how a command reads it. A new kind is a function in ``KINDS``."""

import contextlib
import io
import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchvision.transforms.functional import to_tensor
from transformers import PreTrainedTokenizerFast

from geomreg import EmbeddingCache, Embeddings, Teacher
from geomreg.integrations.quickstart import data as quickstart_data
from geomreg.integrations.recipes import checkpoint, finetune, records, streams
from geomreg.integrations.recipes import cli as command
from geomreg.integrations.recipes.config import Config, DataConfig, ModelConfig, MonitorConfig, TrainConfig
from geomreg.integrations.recipes.data import Captioned, CocoCaptions, CsvPairs, Flickr8k, FMoW, IWildCam, LabelledFolder, Subset, TarPairs
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.head import load_head
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.monitor import RunMonitor
from geomreg.integrations.recipes.preprocess import Preprocess
from geomreg.integrations.recipes.records import Log

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
IDS = [str(row) for row in range(6)]


class Kind(NamedTuple):
    """Some files, and what a command makes of them."""

    files: list[Path]
    read: Callable[[], Any]
    options: bool = False  # that messages name instead of the file
    checked: bool = True  # False: files that users write have no place for a checksum; other content is another's data


# what a run writes ----------------------------------------------------------------------------------------------------


def of_checkpoint(folder: Path) -> Kind:
    """Two with the same content: going back to the first counts as made anew."""
    torch.manual_seed(0)
    content = {"weight": torch.randn(8, 8), "step": 3, "names": ["a", None, 1.5]}
    for step in (1, 2):
        partial = checkpoint.begin(folder, step)
        for name in ("model", "optimizer"):
            checkpoint.write(partial, name, {**content, "of": name})
        checkpoint.publish(partial)

    def read() -> Any:
        checkpoint._WARNED.clear()
        found = checkpoint.latest(folder)
        assert found is not None
        return [checkpoint.read(found, name) for name in ("model", "optimizer")]

    return Kind(sorted((folder / "step-000000002").iterdir()), read)


def of_run(folder: Path) -> Kind:
    """Configuration and data of a run that goes on."""
    one = configured(folder)
    dataset = {"target": type("Data", (list,), {"fingerprint": {"image": "1a2b", "text": "3c4d"}})(range(5))}

    def read() -> Any:
        try:
            records._claim(one, dataset)
        finally:
            records.release()
        return json.loads((folder / "data.json").read_text())

    read()
    return Kind([folder / "config.json", folder / "data.json"], read)


def of_environment(folder: Path) -> Kind:
    """By which a tracker knows a run that goes on."""
    one = configured(folder, trackers=("json",))
    records._claim(one, {})
    records.release()

    def read() -> Any:
        started: list[Any] = []
        accelerator = SimpleNamespace(is_main_process=True, init_trackers=lambda *given: started.append(given[2]))
        with contextlib.redirect_stderr(io.StringIO()):
            Log(one, 9, accelerator)  # type: ignore[arg-type]
        return started

    return Kind([folder / "environment.json"], read)


def of_metrics(folder: Path) -> Kind:
    def make() -> Log:
        return Log(SimpleNamespace(output=folder, trackers=()), 9, SimpleNamespace(is_main_process=True))  # type: ignore[arg-type]

    with contextlib.redirect_stderr(io.StringIO()):
        log = make()
        for step in range(1, 6):
            log.add({"step": step, "loss": 1 / step})
    state = log.state_dict()

    def read() -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            make().load_state_dict(state)
        return (folder / "metrics.jsonl").read_text()

    return Kind([folder / "metrics.jsonl"], read)


def of_reports(folder: Path) -> Kind:
    """Of the drift monitor and the evaluations: written from a checkpoint."""
    entries = [{"step": step, "rsa": 1 / step} for step in range(1, 6)]
    accelerator = SimpleNamespace(is_main_process=True, device="cpu")

    def read() -> Any:
        monitor, evaluation = object.__new__(RunMonitor), object.__new__(finetune._Evaluation)
        monitor.file, monitor.accelerator, evaluation.file = folder / "drift.jsonl", accelerator, folder / "evaluation.jsonl"
        monitor.monitor = SimpleNamespace(load_state_dict=lambda state: None)
        evaluation.config = SimpleNamespace(best=None, output=folder)
        monitor.load_state_dict({"entries": entries, "monitor": {"rows": {}}})
        evaluation.load_state_dict({"entries": entries})
        return [monitor.file.read_text(), evaluation.file.read_text()]

    read()
    return Kind([folder / "drift.jsonl", folder / "evaluation.jsonl"], read)


def of_broken(folder: Path) -> Kind:
    """A list for people, to which lines are added."""
    streams._list(folder / "broken.txt", ["a.png: no such file", "b.png: truncated"])

    def read() -> Any:
        streams._list(folder / "broken.txt", ["c.png: empty file"])
        return (folder / "broken.txt").read_bytes()

    read()
    return Kind([folder / "broken.txt"], read, checked=False)


def configured(folder: Path, **more: Any) -> Config:
    return Config(ModelConfig("emojiclip"), DataConfig("csv", "pairs.csv"), TrainConfig(steps=4), folder, monitor=MonitorConfig(), **more)


# models ---------------------------------------------------------------------------------------------------------------


def of_export(folder: Path) -> Kind:
    """``model``, ``best`` and ensembles of a run with a head."""
    torch.manual_seed(0)
    head = (torch.nn.Linear(8, 3), torch.nn.Linear(8, 3), ("owl", "fox", "cat"))
    to_open_clip(open_clip.CLIP(**TINY), {"model_cfg": TINY, "preprocess_cfg": PREPROCESS}, folder / "model", head=head)

    def read() -> Any:
        found = load(str(folder / "model"))
        head = load_head(folder / "model")
        trained = None if head is None else [head[0].state_dict(), head[1].state_dict(), head[2]]
        return [found.model.state_dict(), found.transform(Image.new("RGB", (9, 20))), found.config, found.tokenizer(["a red fox"]), trained]

    return Kind(sorted((folder / "model").iterdir()), read)


def of_tokenizer(folder: Path) -> Kind:
    """An export whose model has a tokenizer of Hugging Face; its weights are those of another kind."""
    known = ("[PAD]", "[UNK]", "[EOS]", "a", "red", "fox", "two", "boats")
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder)
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "hf_tokenizer_name": "somebody/words"}}  # type: ignore[dict-item]
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    torch.manual_seed(0)
    to_open_clip(open_clip.CLIP(**TINY), {"model_cfg": config, "preprocess_cfg": PREPROCESS}, folder / "model", tokenizer=tokenizer)

    def read() -> Any:
        found = load(str(folder / "model"))
        return [found.model.state_dict(), found.tokenizer(["a red fox", "two boats"])]

    return Kind(sorted(path for path in (folder / "model").iterdir() if "token" in path.name), read)


def of_folder(folder: Path) -> Kind:
    """A model's folder without checksums: of another program, or of an older version."""
    kind = of_export(folder)
    (folder / "model" / "checksums.json").unlink()
    return Kind([path for path in kind.files if path.name != "checksums.json"], kind.read, checked=False)


def of_weights(folder: Path) -> Kind:
    """Files that people pass with a model's name."""
    torch.manual_seed(0)
    state = open_clip.CLIP(**TINY).state_dict()
    save_file(state, folder / "weights.safetensors")
    torch.save(state, folder / "weights.pt")
    stated = Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "shortest")

    def read() -> Any:
        with patch.dict(open_clip.factory._MODEL_CONFIGS, {"tiny": TINY}):
            found = [load("tiny", str(folder / name), preprocess=stated) for name in ("weights.safetensors", "weights.pt")]
        return [one.model.state_dict() for one in found]

    return Kind([folder / "weights.safetensors", folder / "weights.pt"], read, checked=False)


# caches ---------------------------------------------------------------------------------------------------------------


class Samples(list):  # type: ignore[type-arg]
    """Forty of a picture and a text."""

    def __init__(self, end: int = 40) -> None:
        super().__init__(
            {
                "id": f"sample {row}",
                "image": torch.randn(4, generator=torch.Generator().manual_seed(row)),
                "text": torch.tensor([1, row, 0]),
            }
            for row in range(40)
        )
        self.end, self.last = end, -1

    def __getitem__(self, row: Any) -> Any:
        if row == self.end and self.last == row - 1:
            raise KeyboardInterrupt
        self.last = row
        return super().__getitem__(row)


def build(folder: Path, samples: Samples) -> EmbeddingCache:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"image": torch.nn.Linear(4, 4), "text": torch.nn.Linear(3, 4)})
    teacher = Teacher(model, _encode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: Any = {"progress": False, "shard_rows": 10, "batch_size": 5}
        return EmbeddingCache.build(teacher, samples, folder, **options)  # type: ignore[arg-type]


def _encode(model: Any, batch: Any) -> Embeddings:
    return Embeddings(image=model["image"](batch["image"]), text=model["text"](batch["text"].float()))


def of_cache(folder: Path) -> Kind:
    """Manifest, tables, shards, ids, and digests of texts."""
    samples = Samples()
    build(folder / "cache", samples)
    ids, texts = [one["id"] for one in samples], torch.stack([one["text"] for one in samples])

    def read() -> Any:
        cache = EmbeddingCache.open(folder / "cache")
        found = [list(cache(ids, text=texts)), list(cache.each_id("image")), list(cache.each_id("text"))]
        with contextlib.suppress(ValueError):  # the texts are compared
            cache(ids, text=texts + 1)
            found.append("other texts")
        return found

    return Kind(sorted(path for path in (folder / "cache").rglob("*") if path.is_file() and path.stat().st_size), read)


def of_unfinished_cache(folder: Path) -> Kind:
    """A build that was interrupted goes on from its shards."""
    with contextlib.suppress(KeyboardInterrupt):
        build(folder / "cache", Samples(end=25))
    samples = Samples()

    def read() -> Any:
        cache = build(folder / "cache", samples)
        return list(cache([one["id"] for one in samples]))

    return Kind(sorted(path for path in (folder / "cache").rglob("*") if path.is_file() and path.stat().st_size), read)


def of_drawings(folder: Path) -> Kind:
    """The quickstart's, which are rasterised once."""
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle cx="4" cy="4" r="3"/></svg>'

    def read() -> Any:
        return quickstart_data.cached_drawings("tests", ["1F989", "1F98A"], lambda code: svg, key={"style": "a"}, cache_dir=folder).images

    read()
    return Kind(sorted(folder.glob("*.safetensors")), read)


# data -----------------------------------------------------------------------------------------------------------------


def tokenize(texts: list[str]) -> torch.Tensor:
    """Code points, padded to 20."""
    return torch.stack([torch.tensor([ord(letter) for letter in text[:20].ljust(20, "\0")]) for text in texts])


READ: dict[str, Any] = {"transform": to_tensor, "tokenizer": tokenize, "strict": True}  # else broken samples are listed, and left out


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (30 * number, 0, 0)).save(folder / name)


def written(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def everything(dataset: Any) -> list[Any]:
    """All that a run knows of a data set."""
    columns = [list(map(str, getattr(dataset, name, ()))) for name in ("ids", "labels", "groups", "classes")]
    return [columns, dataset.fingerprint, [dataset[row] for row in range(len(dataset))]]


def of_tar(folder: Path) -> Kind:
    of_index(folder)
    return Kind([folder / "0.tar"], lambda: everything(TarPairs(folder / "0.tar", **READ)), checked=False)


def of_index(folder: Path) -> Kind:
    """Of tar files."""
    pictures(folder, "0.png")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for row in range(5):
            tar.add(folder / "0.png", f"{row}.png")
            member = tarfile.TarInfo(f"{row}.txt")
            member.size = len(text := f"picture {row}".encode())
            tar.addfile(member, io.BytesIO(text))
        tar.addfile(tarfile.TarInfo("README"))

    def read() -> Any:
        found = TarPairs(folder / "0.tar", **READ, index=folder / "index.safetensors")
        return [everything(found), found._members.tolist(), found.passed_over]

    read()
    return Kind([folder / "index.safetensors"], read)


def of_coco(folder: Path) -> Kind:
    pictures(folder, *(f"{row}.png" for row in IDS))
    images = [{"id": row, "file_name": f"{row}.png"} for row in range(6)]
    annotations = [{"id": 10 + row, "image_id": row, "caption": f"picture {row}"} for row in range(6)]
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}, indent=1))
    return Kind([folder / "captions.json"], lambda: everything(CocoCaptions(folder / "captions.json", root=folder, **READ)), checked=False)


def of_class_names(folder: Path) -> Kind:
    """JSON, CSV and TSV."""
    pictures(folder / "classes", "n1/0.png", "n2/0.png", "n3/0.png")
    names = {"n1": "owl", "n2": "red fox", "n3": "cat, wild"}
    files = [folder / "names.json", written(folder / "names.csv", "folder,name", *(f'{one},"{name}"' for one, name in names.items()))]
    files[0].write_text(json.dumps(names))
    files.append(written(folder / "names.tsv", *(f"{one}\t{name}" for one, name in names.items())))
    return Kind(files, lambda: [everything(LabelledFolder(folder / "classes", class_names=file, **READ)) for file in files], checked=False)


def of_tables(folder: Path) -> Kind:
    """CSV, TSV, and captions and ids beside them."""
    pictures(folder, *(f"{row}.png" for row in IDS))
    files = [
        written(folder / "pairs.csv", "filepath,title", *(f'{row}.png,"picture, {row}"' for row in IDS)),
        written(folder / "pairs.tsv", "filepath\ttitle", *(f"{row}.png\tpicture {row}" for row in IDS)),
        written(folder / "more.csv", "id,caption", *(f"{row}.png,a further text {row}" for row in IDS)),
        written(folder / "ids.txt", "1.png", "4.png"),
    ]

    def read() -> Any:
        csv, tsv = (CsvPairs(file, **READ) for file in files[:2])
        return [everything(one) for one in (csv, Captioned(tsv, files[2]), Subset(tsv, files[3]))]

    return Kind(files, read, checked=False)


def of_flickr8k(folder: Path) -> Kind:
    pictures(folder, *(f"{row}.jpg" for row in IDS))
    files = [
        written(folder / "tokens.txt", *(f"{row}.jpg#{k}\ttext {k} of {row}" for row in IDS for k in (0, 1))),
        written(folder / "split.txt", "1.jpg", "4.jpg"),
        written(folder / "captions.txt", "image,caption", *(f"{row}.jpg,text {k} of {row}" for row in IDS for k in (0, 1))),
    ]

    def read() -> Any:
        return [everything(Flickr8k(files[0], root=folder, split=files[1], **READ)), everything(Flickr8k(files[2], root=folder, **READ))]

    return Kind(files, read, checked=False)


def of_wilds(folder: Path) -> Kind:
    pictures(folder / "train", *(f"{row}.jpg" for row in IDS))
    pictures(folder / "images", *(f"rgb_img_{row}.png" for row in IDS))
    rows = [f"train,{row}.jpg,{int(row) % 2},{row}" for row in IDS]
    years = [f"train,airport,{('DEU', 'FRA', 'XXX')[int(row) % 3]},2012-01-0{int(row) + 1}T12:00:00Z" for row in IDS]
    files = [
        written(folder / "metadata.csv", "split,filename,y,location_remapped", *rows),
        written(folder / "categories.csv", "y,category_id,name", "0,0,empty", "1,2,tayassu pecari", "99999,4,x"),
        written(folder / "rgb_metadata.csv", "split,category,country_code,timestamp", *years),
        written(folder / "country_code_mapping.csv", "name,alpha-3,region", "Germany,DEU,Europe", "France,FRA,Europe"),
    ]
    return Kind(files, lambda: [everything(one(folder, "train", **READ)) for one in (IWildCam, FMoW)], checked=False)


def of_pictures(folder: Path) -> Kind:
    pictures(folder / "n1", "0.png", "1.jpg", "2.webp")
    return Kind(sorted((folder / "n1").iterdir()), lambda: everything(LabelledFolder(folder, **READ)), checked=False)


def of_yaml(folder: Path) -> Kind:
    file = written(
        folder / "own.yaml",
        "model: {name: emojiclip}",
        "target:",
        "  kind: csv",
        "  path: pairs.csv",
        "reference:",
        "  kind: csv",
        "  path: others.csv",
        "train:",
        "  steps: 4",
        "  learning_rate: 1e-4",
        "  warmup_steps: 1",
        "method:",
        "  name: mine",
        "  terms:",
        "    dive: {term: DiVE, weight: 1000.0}",
        "output: run",
    )

    def read() -> Any:
        given: list[Config] = []
        usual, said = finetune.finetune_from, io.StringIO()
        finetune.finetune_from = given.append  # type: ignore[assignment]
        try:
            with contextlib.redirect_stderr(said):
                status = command.main(["finetune", "--config", str(file)])
        except SystemExit as error:  # of the parser
            status = error.code
        finally:
            finetune.finetune_from = usual
        if status:
            lines = [line for line in said.getvalue().splitlines() if not line.startswith("geomreg: warning")]
            raise ValueError("\n".join(lines))
        return repr(given)

    return Kind([file], read, options=True, checked=False)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "checkpoint": of_checkpoint,
    "run": of_run,
    "environment": of_environment,
    "metrics": of_metrics,
    "drift and evaluations": of_reports,
    "broken samples": of_broken,
    "export": of_export,
    "export's tokenizer": of_tokenizer,
    "model's folder": of_folder,
    "weights": of_weights,
    "cache": of_cache,
    "unfinished cache": of_unfinished_cache,
    "drawings": of_drawings,
    "tar index": of_index,
    "tar": of_tar,
    "COCO": of_coco,
    "class names": of_class_names,
    "tables": of_tables,
    "Flickr8k": of_flickr8k,
    "WILDS": of_wilds,
    "pictures": of_pictures,
    "YAML": of_yaml,
}
