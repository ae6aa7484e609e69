"""Serves an exported language model over HTTP with onnxruntime, numpy and tokenizers; no PyTorch.

    python examples/serve.py sparse/onnx --port 8000 [--kernels zeroskip_kernels.so]
    curl -d '{"prompt": "The state of our Union is", "tokens": 16}' localhost:8000

`--kernels` names the library of the sparse kernels, for models with packed weights:

    python -c "import zeroskip; print(zeroskip.custom_ops_path())"

A picture of how little is needed, not a production server: one request at a time, greedy tokens.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

LONGEST_REQUEST = 100_000
MOST_TOKENS = 256


class Generator:
    """A decoder with a key-value cache, as zeroskip exports it."""

    def __init__(self, folder: Path, kernels: str | None = None) -> None:
        options = onnxruntime.SessionOptions()
        if kernels is not None:
            options.register_custom_ops_library(kernels)
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        """The most likely token after the prompt, over and over."""
        shapes = [self.inputs[name] for name in self.past]
        cache = [np.zeros((1, heads, 0, size), np.float32) for _, heads, _, size in shapes]
        new, seen, found = prompt, 0, []
        for _ in range(count):
            seen += len(new)
            feeds = {
                "input_ids": np.array([new], np.int64),
                "attention_mask": np.ones((1, seen), np.int64),
                "position_ids": np.arange(seen - len(new), seen, dtype=np.int64)[None],
            }
            feeds = {name: feeds[name] for name in feeds if name in self.inputs}
            logits, *cache = self.session.run(
                None, {**feeds, **dict(zip(self.past, cache, strict=True))}
            )
            new = [int(logits[0, -1].argmax())]
            found += new
        return found


def make_server(model: Generator, port: int, host: str = "127.0.0.1") -> HTTPServer:
    """A server that answers with a model; port 0 is any free one."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"ready": True})

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", 0))
                if length > LONGEST_REQUEST:
                    raise ValueError("the request is too long")
                asked = json.loads(self.rfile.read(length))
                prompt = model.tokenizer.encode(asked["prompt"]).ids
                count = min(int(asked.get("tokens", 16)), MOST_TOKENS)
                if not prompt or count < 1:
                    raise ValueError("there is nothing to do")
            except (ValueError, KeyError, TypeError) as error:
                self.answer(400, {"error": f"send a JSON object with a prompt: {error}"})
                return
            tokens = model.tokens(prompt, count)
            self.answer(200, {"text": model.tokenizer.decode(tokens), "tokens": len(tokens)})

        def answer(self, status: int, body: dict[str, object]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            return  # Quiet: the caller prints what matters.

    return HTTPServer((host, port), Answers)


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description="Serve an exported language model.")
    parser.add_argument("folder", type=Path, help="a folder with model.onnx and tokenizer.json")
    parser.add_argument("--kernels", help="the library of the sparse kernels")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1")
    arguments = parser.parse_args()
    model = Generator(arguments.folder, arguments.kernels)
    server = make_server(model, arguments.port, arguments.host)
    print(f"listening on http://{arguments.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
