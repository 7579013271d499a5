"""Compiling LLVM IR for this machine and telling XLA of it."""

from __future__ import annotations

import importlib.util
import platform as host
import sys

import jax

from pallas_kernels.native import handler


def unavailable() -> str | None:
    """None, or why no native kernel can run on this machine."""
    if sys.platform == "win32":
        return "it needs a POSIX system"
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed: pip install llvmlite"
    if is_arm():
        return None
    from llvmlite import binding

    machine, features = host.machine().lower(), binding.get_host_cpu_features()
    if machine not in ("x86_64", "amd64") or not (features.get("avx2") and features.get("fma")):
        return f"it needs x86-64 with AVX2 and FMA, or 64-bit Arm; this is {machine} ({binding.get_host_cpu_name()})"
    return None


def is_arm() -> bool:
    return host.machine().lower() in ("aarch64", "arm64")


def compile_ir(ir: str, name: str) -> int:
    """The address of function `name`, whose machine code stays for the life of the process. RuntimeError: bad IR."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=2
    )
    module = binding.parse_assembly(ir)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    address = engine.get_function_address(name)
    engine.detach()  # never freed: XLA may call it until the process ends
    return address


def register(name: str, ir: str) -> str | None:
    """Compile handler `@name` of this IR and tell XLA; returns why that is impossible, or None."""
    try:
        address = compile_ir(ir, name)
    except RuntimeError as error:
        return f"this llvmlite cannot compile it: {error}"
    jax.local_devices(backend="cpu")  # before there is a client, a registration is only kept for later, unchecked
    try:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")
    except jax.errors.JaxRuntimeError as error:
        api = f"{handler.API_MAJOR}.{handler.API_MINOR}"
        return f"this jaxlib does not take handlers of XLA FFI {api}: {error}"
    return None
