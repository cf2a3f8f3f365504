"""The drift monitor of a run: a labelled probe, drift.jsonl, and an early stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from geomreg.integrations.recipes.config import MonitorConfig
from geomreg.integrations.recipes.data import collate
from geomreg.integrations.recipes.evaluate import embed_images, zero_shot_head
from geomreg.integrations.recipes.records import as_json
from geomreg.integrations.recipes.waiting import alone
from geomreg.metrics import Alarm, DriftMonitor
from geomreg.shards import write_file

__all__ = ["RunMonitor"]


class RunMonitor:
    """A :class:`~geomreg.metrics.DriftMonitor` on a probe, whose reports go to drift.jsonl, null where a number is not defined; it
    measures in the main process. The file is written from what is kept here and in checkpoints, and never read.

    Args:
        current: the model as it is now, whole; called on all processes.
        dataset: labelled, with ``templates``; a random part of it, the same each time, is the probe.
        tokens: ``(T, C, L)`` token ids of its classes, of which the first template is used.
        options: how.
        folder: of the run.
        accelerator: of the run.
        workers: loading processes.

    Attributes:
        dataset: as given.
        entries: the reports so far, the same on all processes.
        stopped: an alarm ended the run.
    """

    def __init__(
        self,
        current: Callable[[], nn.Module],
        dataset: Any,
        tokens: Tensor,
        options: MonitorConfig,
        folder: Path,
        accelerator: Accelerator,
        *,
        workers: int = 0,
    ) -> None:
        self.current, self.dataset, self.options, self.accelerator = current, dataset, options, accelerator
        self.file = folder / "drift.jsonl"
        rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: options.samples].sort().values
        loader = DataLoader(Subset(dataset, rows.tolist()), 64, num_workers=workers, collate_fn=collate, generator=torch.Generator())
        batches = [batch for batch in loader if batch["id"]]
        if sum(len(batch["id"]) for batch in batches) < 3:
            raise RuntimeError("monitor: expected at least 3 samples of the probe that can be read, got fewer. Look at the data set.")
        self.tokens = tokens[:1]  # one template: those of all classes in 80 would cost more than many steps
        self.images, self.labels = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
        self.model = current()
        limits = {"max_zero_shot_drop": options.max_zero_shot_drop, "min_rsa": options.min_rsa}
        self.monitor = DriftMonitor(probe=self._probe, labels=self.labels, every=options.every, on_alarm=self._alarm, **limits)
        self.alarm: str | None = None
        self.entries: list[dict[str, Any]] = []

    @property
    def stopped(self) -> bool:
        return bool(self.entries and self.entries[-1].get("stopped"))

    @property
    def last_step(self) -> int | None:
        """The run's last step, if an alarm has ended it: the one after the alarm, before which all processes hear of it."""
        return int(self.entries[-1]["step"]) + 1 if self.stopped else None

    def state_dict(self) -> dict[str, Any]:
        return {"entries": self.entries, "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as after a checkpoint; later lines of drift.jsonl are made again, and damaged ones too."""
        self.entries = list(state["entries"])
        device = self.accelerator.device
        rows = {field: [[one.to(device) for one in pair] for pair in pairs] for field, pairs in state["monitor"]["rows"].items()}
        self.monitor.load_state_dict({**state["monitor"], "rows": rows})
        if self.entries:
            self._write()

    def _write(self) -> None:
        if self.accelerator.is_main_process:
            write_file(self.file, "".join(f"{as_json(entry)}\n" for entry in self.entries).encode())

    def after(self, entry: dict[str, float]) -> None:
        """After a step: measure, if it is time."""
        step = int(entry["step"])
        if not self.monitor.due(step):
            return
        self.model = self.current()
        found: list[dict[str, Any]] = [{}]
        with alone(self.accelerator) as main:
            if main:
                self.alarm = None
                report = self.monitor.compute()
                if "gradient_ratio" in entry:
                    report["gradient_ratio"] = entry["gradient_ratio"]
                found = [{"step": step, **report} | ({} if self.alarm is None else {"alarm": self.alarm, "stopped": self.options.stop})]
        broadcast_object_list(found)
        self.entries = [*(entry for entry in self.entries if entry["step"] < step), *found]
        self._write()

    def _alarm(self, alarm: Alarm) -> bool:
        self.alarm = str(alarm) if self.alarm is None else f"{self.alarm}; {alarm}"
        print(f"finetune: {alarm}" + ("; the run ends here" if self.options.stop else ""))
        return self.options.stop

    def _probe(self) -> tuple[Tensor, Tensor]:
        training = self.model.training
        self.model.eval()
        try:
            return embed_images(self.model, self.images), zero_shot_head(self.model, self.tokens)
        finally:
            self.model.train(training)
