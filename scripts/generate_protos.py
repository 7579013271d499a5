"""Generate the Python stubs of serving/protos from the .proto files, next to them.

    python scripts/generate_protos.py [--out DIR] [--check]

The stubs are committed, so that installing needs no compiler. grpcio-tools must be the version below: what it makes
runs on every protobuf from 6.33.5 up, and a test compares its bytes with the committed ones.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROTOS = ("serving/protos/jaxinfer/v1/inference.proto",)
GRPCIO_TOOLS_VERSION = "1.81.1"


def generate(out_dir: Path) -> list[Path]:
    """Write the stubs of every proto below `out_dir`, at the same relative paths; returns those paths."""
    import grpc_tools
    from grpc_tools import protoc

    found = importlib.metadata.version("grpcio-tools")
    if found != GRPCIO_TOOLS_VERSION:
        raise RuntimeError(f"grpcio-tools {found} is installed, but the stubs are made with {GRPCIO_TOOLS_VERSION}")
    out_dir.mkdir(parents=True, exist_ok=True)
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={out_dir}" for kind in ("python", "pyi", "grpc_python")]
    made = []
    for proto in PROTOS:
        status = protoc.main(["protoc", f"-I{REPOSITORY}", f"-I{well_known}", *outputs, proto])
        if status:
            raise RuntimeError(f"protoc failed on {proto} with exit code {status}")
        stem = proto.removesuffix(".proto")
        made += [Path(stem + suffix) for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]
    return made


def stale(fresh_dir: Path) -> list[Path]:
    """Generate into `fresh_dir`; the paths whose committed bytes differ."""
    made = generate(fresh_dir)
    committed = {path: REPOSITORY / path for path in made}
    fresh = {path: (fresh_dir / path).read_bytes() for path in made}
    return [p for p in made if not committed[p].is_file() or committed[p].read_bytes() != fresh[p]]


def main() -> int:
    """Parse the arguments and generate or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY, help="root to write below (default: this repository)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the committed stubs are stale")
    args = parser.parse_args()
    if args.check:
        with tempfile.TemporaryDirectory() as directory:
            differing = stale(Path(directory))
        for path in differing:
            print(f"{path} is not what scripts/generate_protos.py makes", file=sys.stderr)
        return 1 if differing else 0
    for path in generate(args.out):
        print(args.out / path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
