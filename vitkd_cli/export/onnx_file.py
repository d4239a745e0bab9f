"""An ONNX file for any number of images: float32, float16 weights, or eight bits."""

import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.export.check import BATCH
from vitkd_cli.export.target import Outputs, Target, any_batch
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import in_unit_range

INPUT = "images"
IMAGES = "uint8, 0 to 255, [B, H, W, C]"
NORMALISED = "float32, (x / 255 - mean) / std, [B, C, H, W]"
LIMIT = 2**31  # bytes of one file: protobuf's


class _WithPreprocessing(nn.Module):
    """uint8 images ``[B, H, W, C]`` → probabilities ``[B, K]``, or the model's embedding."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.net = model.net
        self.classifies = model.gives == "logits"
        self.mean = nn.Buffer(torch.tensor(model.spec.mean).view(-1, 1, 1))
        self.std = nn.Buffer(torch.tensor(model.spec.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2).float() / 255
        outputs: Tensor = self.net((images - self.mean) / self.std)
        return outputs.softmax(1) if self.classifies else outputs


class OnnxFile(Target):
    """Checked in ONNX Runtime, with as many threads as torch has."""

    ending = ".onnx"
    options = ("opset", "half", "int8", "preprocess")
    packages = ("onnx", "onnxruntime", "onnxscript")
    tolerance = 1e-4

    def write(self, path: Path, others: Tensor | None) -> tuple[str, ...]:
        import onnx

        request, notes = self.request, []
        file = self._traced()
        (opset,) = (entry.version for entry in file.opset_import if entry.domain == "")
        if request.opset not in (None, opset):
            raise UserError(
                f"--opset {request.opset}: torch {torch.__version__} writes this model in opset {opset}",
                "leave --opset out, or name another",
            )
        notes.append(f"opset {opset}")
        if request.half:
            file = _in_half(file)
        if request.int8 and others is not None:
            file = _in_eight_bits(file, map(self._fed, others.split(BATCH)), path)
            notes.append(f"calibrated on {len(others)} images")
        about = {"input": IMAGES if request.preprocess else NORMALISED, "output": self.gives}
        facts = {**self.facts(), **{key: json.dumps(value) for key, value in about.items()}}
        onnx.helper.set_model_props(file, facts)
        onnx.save(file, path)
        return tuple(notes)

    def load(self, path: Path) -> Outputs:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        return lambda images: [torch.from_numpy(session.run(None, self._fed(images))[0])]

    def expected(self) -> Outputs:
        own = super().expected()
        return (lambda images: [own(images)[0].softmax(1)]) if self.gives == "probabilities" else own

    @property
    def allowed(self) -> float | None:
        return None if self.request.half or self.request.int8 else self.tolerance

    @property
    def gives(self) -> str:
        """``probabilities``, or what the model gives."""
        return "probabilities" if self.request.preprocess and self.classifies else self.model.gives

    def _fed(self, images: Tensor) -> dict[str, Any]:
        """What the file takes, of uint8 images ``[B, C, H, W]``."""
        if self.request.preprocess:
            return {INPUT: images.permute(0, 2, 3, 1).contiguous().numpy()}
        return {INPUT: self.model.normalised(in_unit_range(images, images.device)).numpy()}

    def _traced(self) -> Any:
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass

        net, spec = self.model.net, self.model.spec
        images = torch.zeros(self.request.batch_size, len(spec.mean), *spec.input_size)
        if self.request.preprocess:
            net, images = _WithPreprocessing(self.model), images.permute(0, 2, 3, 1).contiguous().byte()
        if sum(t.numel() * t.element_size() for t in net.state_dict().values()) > LIMIT:
            raise UserError(f"{spec.name} is over the 2 GiB of one ONNX file", "--to torch")
        try:
            with _unfused(net), _quiet():
                program = torch.onnx.export(
                    net,
                    (images,),
                    dynamo=True,
                    dynamic_shapes=({0: any_batch()},),
                    input_names=[INPUT],
                    output_names=[self.gives],
                    opset_version=self.request.opset,
                    verbose=False,
                )
            assert program is not None
            # Every node tells from which line of which file of this machine it comes.
            ClearMetadataAndDocStringPass()(program.model)
            return program.model_proto
        except Exception as problem:  # torch's own errors have no common class
            raise _impossible(spec.name, problem) from problem


@contextmanager
def _unfused(net: nn.Module) -> Iterator[None]:
    """Attention in plain products: of the fused call, ONNX has no form with biases or five dimensions."""
    modules: list[Any] = [module for module in net.modules() if hasattr(module, "fused_attn")]
    fused = {module: module.fused_attn for module in modules}
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module, was in fused.items():
            module.fused_attn = was


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters log every attempt; what fails comes as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _impossible(name: str, problem: BaseException) -> UserError:
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(problem)):
        what = f"ONNX has no operator for {missing[1]}"
    else:
        while problem.__cause__ is not None:  # torch wraps the reason in advice
            problem = problem.__cause__
        what = first_line(problem)
    return UserError(
        f"{name} cannot be written as ONNX: {what}",
        "--to torch writes it; or try another --img-size",
        exit_code=3,
    )


def _in_half(model: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        return convert_float_to_float16(model, keep_io_types=True)


def _in_eight_bits(file: Any, calibration: Iterator[dict[str, Any]], path: Path) -> Any:
    """Static quantisation of products with weights, and of convolutions, per channel.

    Products of activations stay in floating point: attention maps are mostly close to zero, and eight bits
    between 0 and 1 tell little of them. Weights take seven of their eight bits: on CPUs without VNNI, sums of
    products of eight saturate at 16 bits.

    Args:
        path: of the export, beside which there is room for three files.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(calibration, None)

    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        whole, shaped, quantised = (
            Path(folder, f"{stage}.onnx") for stage in ("whole", "shaped", "quantised")
        )
        onnx.save(file, whole)
        # ONNX's own shapes do: ONNX Runtime's symbolic ones fail on what some versions of torch write.
        quant_pre_process(whole, shaped, skip_symbolic_shape=True)
        quantize_static(
            shaped,
            quantised,
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(quantised)
