"""`tensorrt` as its API is documented, for what is decided before and after a build: it records what it is told.

Attributes that only some versions have are left out on purpose: see `older` and `newer`.
"""

from __future__ import annotations

from types import SimpleNamespace


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self):
        pass


class IProgressMonitor:
    def __init__(self):
        pass


class FakeTensorRT(SimpleNamespace):
    """`plan`: what a build gives, None for failure; `errors`: what the library then logs; `parse`: (node, operator, why).
    `profile_index`: -1 where it refuses a profile. `foreign_timings`: a timing cache of another GPU, which it refuses."""

    def __init__(
        self, version="10.3.0", plan=b"plan", errors=(), parse=None, typed=True, steps=((0, 2), (1, 2)), inputs=None
    ):
        flags = SimpleNamespace(
            **{name: name for name in ("REFIT", "REFIT_IDENTICAL", "STRIP_PLAN", "WEIGHT_STREAMING")}
        )
        preview = SimpleNamespace(RUNTIME_ACTIVATION_RESIZE_10_10="RESIZE")
        creation = SimpleNamespace(**({"STRONGLY_TYPED": 1} if typed else {}))
        super().__init__(
            __version__=version, ILogger=ILogger, IProgressMonitor=IProgressMonitor, BuilderFlag=flags,
            PreviewFeature=preview, MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"), NetworkDefinitionCreationFlag=creation, told={"flags": [], "shapes": {}}, plan=plan, errors=errors,
            parse=parse, steps=steps, inputs=inputs or {"x": (-1, 4, -1, -1)}, profile_index=0, foreign_timings=None,
        )  # fmt: skip
        self.Builder = lambda logger: Builder(self, logger)
        self.OnnxParser = lambda network, logger: Parser(self)


class Builder:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def create_network(self, flags):
        self.trt.told["network"] = flags
        inputs = [SimpleNamespace(name=name, shape=shape) for name, shape in self.trt.inputs.items()]
        return SimpleNamespace(num_inputs=len(inputs), num_outputs=1, get_input=lambda i: inputs[i])

    def create_builder_config(self):
        return Config(self.trt)

    def create_optimization_profile(self):
        return SimpleNamespace(set_shape=lambda name, *shapes: self.trt.told["shapes"].update({name: shapes}))

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        for step, _ in self.trt.steps:
            if not monitor.step_complete("Building engine", step):
                self.logger.log(ILogger.ERROR, "Build canceled by user")
                return None
        monitor.phase_finish("Building engine")
        for message in self.trt.errors:
            self.logger.log(ILogger.ERROR, message)
        return None if self.trt.plan is None else memoryview(self.trt.plan)  # an IHostMemory, which is a buffer


class Config:
    def __init__(self, trt):
        self.trt = trt
        self.progress_monitor = None

    def set_flag(self, flag):
        self.trt.told["flags"].append(flag)

    def set_preview_feature(self, feature, on):
        self.trt.told["preview"] = feature, on

    def set_memory_pool_limit(self, pool, size):
        self.trt.told["limit"] = pool, size

    def add_optimization_profile(self, profile):
        return self.trt.profile_index

    def create_timing_cache(self, known):
        self.trt.told["timing cache"] = known
        return SimpleNamespace(known=known, serialize=lambda: memoryview(known + b"+"))

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        return cache.known != self.trt.foreign_timings


class Parser:
    def __init__(self, trt):
        self.trt = trt
        self.num_errors = 1 if trt.parse else 0

    def parse_from_file(self, path):
        self.trt.told["path"] = path
        return not self.trt.parse

    def get_error(self, index):
        node, operator, why = self.trt.parse
        return SimpleNamespace(desc=lambda: why, node=lambda: 7, node_name=lambda: node, node_operator=lambda: operator)
