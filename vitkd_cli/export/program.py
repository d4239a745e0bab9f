"""A ``torch.export`` program: the model as torch alone runs it, with any number of images."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.export.target import Outputs, Target, any_batch

FACTS = "vitkd.json"  # in the file; torch.export.load's extra_files read it


class Program(Target):
    """Normalised images in, logits out; classes and preprocessing are in the file's ``vitkd.json``."""

    ending = ".pt2"
    tolerance = 1e-4

    def write(self, path: Path, others: Tensor | None) -> tuple[str, ...]:
        spec = self.model.spec
        images = torch.zeros(self.request.batch_size, len(spec.mean), *spec.input_size)
        try:
            program = torch.export.export(self.model.net, (images,), dynamic_shapes=({0: any_batch()},))
        except Exception as problem:  # torch's own errors have no common class
            raise UserError(
                f"torch.export cannot trace {spec.name}: {first_line(problem)}",
                "--to timm or --to state-dict; or another --img-size",
                exit_code=3,
            ) from problem
        for node in program.graph.nodes:  # which line of which file of this machine it comes from
            node.meta.pop("stack_trace", None)
        facts = json.dumps({key: json.loads(value) for key, value in self.facts().items()})
        with open(path, "wb") as file:  # by its name torch would call the archive's folder
            torch.export.save(program, file, extra_files={FACTS: facts})
        return ()

    def load(self, path: Path) -> Outputs:
        return self.runs(move_to_device_pass(torch.export.load(path), self.device).module())
