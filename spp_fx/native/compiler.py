"""From an LLVM module to the bytes of an object file for this CPU."""

from typing import TYPE_CHECKING

from llvmlite import binding

from spp_fx.native.target import Host, target_machine

if TYPE_CHECKING:
    from llvmlite import ir


def compile_module(module: "ir.Module", target: Host) -> bytes:
    """The object file, optimised as clang -O3 does.

    Raises:
        RuntimeError: LLVM cannot read the module; its message names the line.
    """
    machine = target_machine(target)
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    options.slp_vectorization = True
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return machine.emit_object(parsed)
