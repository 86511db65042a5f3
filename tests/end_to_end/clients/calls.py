"""Triton's and KServe's clients against a service, in an environment of their own: prints what they saw as JSON.

python calls.py URL MANAGEMENT_URL MODEL IMAGES.npy FILE
"""

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import kserve
import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from kserve.protocol.infer_type import RequestedOutput
from tritonclient.utils import InferenceServerException


def triton_inputs(images: np.ndarray, file: bytes, *, binary: bool) -> dict[str, Any]:
    pixels = triton.InferInput("images", list(images.shape), "UINT8")
    pixels.set_data_from_numpy(images, binary_data=binary)
    files = triton.InferInput("image_bytes", [2], "BYTES")
    values = [file, file] if binary else [base64.b64encode(file)] * 2
    files.set_data_from_numpy(np.array(values, dtype=object), binary_data=binary)
    return {"images": pixels, "image_bytes": files}


def by_triton(host: str, management: str, model: str, images: np.ndarray, file: bytes) -> dict[str, Any]:
    client, operator = triton.InferenceServerClient(host), triton.InferenceServerClient(management)
    seen: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "other_ready": client.is_model_ready("other"),
        "version_ready": client.is_model_ready(model, "1"),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata(model, "1"),
        "config": client.get_model_config(model),
        "index": operator.get_model_repository_index(),
    }
    for binary in (True, False):
        for name, tensor in triton_inputs(images, file, binary=binary).items():
            outputs = [
                triton.InferRequestedOutput("probabilities", binary_data=binary),
                triton.InferRequestedOutput("logits", binary_data=binary, class_count=2),
            ]
            result = client.infer(model, [tensor], outputs=outputs, request_id="seven", timeout=9_000_000)
            seen[f"{name}_{binary}"] = {
                "probabilities": result.as_numpy("probabilities").tolist(),
                "logits": [[text if isinstance(text, str) else text.decode() for text in row]
                           for row in result.as_numpy("logits").tolist()],
                "id": result.get_response()["id"],
                "version": result.get_response()["model_version"],
            }  # fmt: skip
    pixels, files = triton_inputs(images, file, binary=True).values()
    seen["default"] = client.infer(model, [pixels]).as_numpy("logits").tolist()
    seen["async"] = client.async_infer(model, [pixels], model_version="1").get_result().as_numpy("logits").tolist()
    seen["errors"] = [
        error_of(lambda: client.infer("other", [pixels])),
        error_of(lambda: client.infer(model, [pixels], model_version="2")),
        error_of(lambda: client.infer(model, [pixels, files])),
        error_of(lambda: client.infer(model, [pixels], outputs=[triton.InferRequestedOutput("features")])),
        error_of(lambda: client.infer(model, [pixels], request_compression_algorithm="gzip")),
        error_of(lambda: client.load_model(model)),
        error_of(lambda: client.get_inference_statistics(model)),
        error_of(lambda: client.get_model_repository_index()),
        error_of(lambda: operator.get_model_metadata(model)),
    ]
    seen["stats"] = [operator.get_inference_statistics(model), operator.get_inference_statistics()]
    client.close()
    operator.close()
    return seen


def error_of(call: Any) -> list[str]:
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    raise AssertionError("there is no error")


async def by_triton_aio(host: str, model: str, images: np.ndarray, file: bytes) -> dict[str, Any]:
    async with triton_aio.InferenceServerClient(host) as client:
        tensors = triton_inputs(images, file, binary=True)
        results = await asyncio.gather(*(client.infer(model, [tensor]) for tensor in tensors.values()))
        return {
            "ready": await client.is_server_ready(),
            "metadata": await client.get_model_metadata(model),
            **{name: result.as_numpy("logits").tolist() for name, result in zip(tensors, results, strict=True)},
        }


async def by_kserve(url: str, model: str, images: np.ndarray, file: bytes) -> dict[str, Any]:
    async with kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2")) as client:

        async def infer(tensor: Any, *outputs: Any) -> Any:
            request = kserve.InferRequest(model, [tensor], request_outputs=list(outputs) or None, request_id="seven")
            return await client.infer(url, request, model_name=model)

        seen: dict[str, Any] = {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "model_ready": await client.is_model_ready(url, model),
            "other_ready": await client.is_model_ready(url, "other"),
        }
        for binary in (True, False):
            pixels = kserve.InferInput("images", list(images.shape), "UINT8")
            pixels.set_data_from_numpy(images, binary_data=binary)
            answer = await infer(pixels, RequestedOutput("logits", {"binary_data": binary}))
            seen[f"images_{binary}"] = answer.outputs[0].as_numpy().tolist()
            seen["id"] = answer.id
        files = kserve.InferInput("image_bytes", [2], "BYTES")
        files.set_data_from_numpy(np.array([file, file], dtype=object))
        answer = await infer(files, RequestedOutput("probabilities", {"classification": 1}))
        seen["labels"] = answer.outputs[0].data
        try:
            await client.infer(url, kserve.InferRequest("other", [files]), model_name="other")
        except httpx.HTTPStatusError as error:
            seen["error"] = str(error)
        return seen


def main() -> None:
    url, management, model = sys.argv[1:4]
    images, file = np.load(sys.argv[4]), Path(sys.argv[5]).read_bytes()
    host = url.removeprefix("http://")
    seen = {
        "triton": by_triton(host, management.removeprefix("http://"), model, images, file),
        "triton_aio": asyncio.run(by_triton_aio(host, model, images, file)),
        "kserve": asyncio.run(by_kserve(url, model, images, file)),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
