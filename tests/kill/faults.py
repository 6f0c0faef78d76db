"""The planted faults, as edits of the source: dropped scales, slots off by one, swapped states, and the like."""

from __future__ import annotations

from dataclasses import dataclass

PROPERTIES = {
    "P2 saved": "properties/test_modules.py::test_p1_p2_saving_and_loading_is_the_identity",
    "P1 text": "properties/test_modules.py::test_p1_every_change_shows_in_the_text",
    "P4 verifier": "properties/test_modules.py::test_p4_damage_is_told_with_its_code",
    "P5 word": "properties/test_modules.py::test_p5_p8_p9_every_pass_keeps_its_word",
    "P5 shapes": "properties/test_shapes.py",
    "P6 transaction": "properties/test_modules.py::test_p6_a_pass_that_fails_leaves_the_module_alone",
    "P7 sites": "properties/test_modules.py::test_p7_passes_fire_at_every_planted_site",
    "P7 near misses": "properties/test_modules.py::test_p7_near_misses_are_left_alone_and_reported",
    "P10 passes": "properties/test_numbers.py::test_p10_every_pass_keeps_its_numeric_promise",
    "P10 frontend": "properties/test_frontend.py::test_p10_drawn_configurations_answer_as_transformers",
    "P11 packages": "properties/test_numbers.py::test_p11_packages_answer_as_the_recipe_however_the_request_is_cut",
    "P11 driver": "properties/test_driver.py::TestRequests",
    "P12 rows": "properties/test_numbers.py::test_p12_rows_do_not_know_of_each_other",
    "P12 adapters": "properties/test_adapters.py::test_p12_rows_answer_with_their_own_adapter",
    "P13 orders": "properties/test_numbers.py::test_p13_legal_orders_answer_alike",
    "P14 sequences": "properties/test_numbers.py::test_p14_any_sequence_of_passes_is_refused_or_right",
    "P15 targets": "properties/test_numbers.py::test_p15_both_targets_have_one_interface",
    "slots": "properties/test_cache_ops.py",
    "windows": "properties/test_visibility.py",
    "guards": "passes/test_guards.py",
    "node counts": "passes/test_node_counts.py",
    "refusals": "passes/test_refusals.py",
    "Auto classes": "adapters/test_auto.py",
    "merged adapters": "adapters/test_matrix.py::test_a_merged_adapter_answers_as_peft_does",
}
"""The columns of the table, each a test or a file of them below ``tests``."""


@dataclass(frozen=True)
class Fault:
    """One edit.

    Attributes:
        name: What is wrong.
        file: Source file.
        old: Text that stands there just once.
        new: What to put in its place.
        by: Property that must tell.
    """

    name: str
    file: str
    old: str
    new: str
    by: str


def _faults() -> list[Fault]:
    found: list[Fault] = []

    def plant(file: str, *edits: tuple[str, str, str, str]) -> None:
        found.extend(Fault(name, file, old, new, by) for name, by, old, new in edits)

    plant(
        "passes/attention.py",
        ("scale dropped", "P10 passes", "b.const(scale, np.float32)", "b.const(1.0, np.float32)"),
        (
            "scale applied twice",
            "P10 passes",
            'scores = b("MatMul", grouped, keys)',
            'scores = b("Mul", b("MatMul", grouped, keys), b.const(scale, np.float32))',
        ),
        ("soft-cap dropped", "P10 passes", "if cap > 0.0:", "if cap > 1e9:"),
        (
            "mask negated",
            "P10 passes",
            'b("Unsqueeze", mask, b.const([1]))',
            'b("Not", b("Unsqueeze", mask, b.const([1])))',
        ),
        ("hidden keys not hidden", "P10 passes", "HIDDEN_SCORE = -65504.0", "HIDDEN_SCORE = -5.0"),
        ("bias of heads kept together", "guards", "mask.shape[1] == heads > 1:", "mask.shape[1] == heads > kv_heads:"),
        (
            "sinks of other heads",
            "P10 passes",
            "b.const([1, kv_heads, heads // kv_heads, 1, 1]))",
            'b.const([1, heads // kv_heads, kv_heads, 1, 1]))\n    logit = b("Transpose", logit, perm=[0, 2, 1, 3, 4])',
        ),
        (
            "heads grouped in strides",
            "P10 passes",
            "b.const([0, kv_heads, heads // kv_heads, -1, width]))",
            "b.const([0, heads // kv_heads, kv_heads, -1, width]))\n"
            '    grouped = b("Transpose", grouped, perm=[0, 2, 1, 3, 4])',
        ),
        ("one layer left out", "P5 word", "for node in self.sites(module):", "for node in self.sites(module)[:1]:"),
    )
    plant(
        "passes/_kv_layouts.py",
        (
            "ring a turn behind",
            "P10 passes",
            'b("LessOrEqual", this_turn, last), this_turn',
            'b("Less", this_turn, last), this_turn',
        ),
        (
            "ring slots not wrapped",
            "P10 passes",
            'b("Mod", self.position_ids, self.length(slots)) if slots.ring else self.position_ids',
            "self.position_ids",
        ),
        (
            "newest slot taken for empty",
            "P10 passes",
            'b("Greater", self.slot_range(slots), self.last())',
            'b("GreaterOrEqual", self.slot_range(slots), self.last())',
        ),
        ("values of empty slots seen", "P11 packages", "if not masked:", "if False:"),
        ("padding written", "P10 passes", 'b("Where", self.padded(), b.const(DROPPED), slot)', "slot"),
        (
            "idle rows overwrite their first slots",
            "P11 packages",
            'b("Where", self._idle(), spare, self._first())',
            'b("Where", self._idle(), b.const(0), self._first())',
        ),
        (
            "idle rows overwrite their ring",
            "P11 packages",
            'new = b("Where", self._idle_rows(), found, new)',
            "new = new",
        ),
        ("ring does not wrap", "P11 packages", 'mode = "circular"', 'mode = "linear"'),
        (
            "one spare slot",
            "P11 packages",
            'spare = max(s.symbols["seq_len"] for s in module.specializations)',
            "spare = 1",
        ),
        (
            "keys written to the slot after",
            "P10 passes",
            'retained = b("CtxScatter", past, self._written(slots), new,',
            'retained = b("CtxScatter", past, b("Add", self._written(slots), b.const(1)), new,',
        ),
    )
    plant(
        "passes/kv_retention.py",
        ("ring one slot short", "windows", "return window + longest - 1", "return window + longest - 2"),
        (
            "rings of one window only",
            "P7 sites",
            "sorted({s.window for s in module.states if s.window is not None}):",
            "sorted({s.window for s in module.states if s.window is not None})[:1]:",
        ),
        (
            "states of two layers swapped",
            "P10 passes",
            "        layout.finish()\n",
            "        layout.finish()\n"
            '        keys = [v for v in module.graph.outputs if (v.name or "").startswith("past_key")]\n'
            "        if len(keys) > 1 and str(keys[0].shape) == str(keys[1].shape):\n"
            "            keys[0].name, keys[1].name = keys[1].name, keys[0].name\n",
        ),
        (
            "ring where it is as long as the context",
            "P7 sites",
            "if _ring_length(module, window) >= ctx_len:",
            "if _ring_length(module, window) > ctx_len:",
        ),
    )
    plant(
        "passes/last_logits.py",
        ("first token's logits", "P10 passes", 'b("ArgMax", positions', 'b("ArgMin", positions'),
        (
            "stale shape",
            "P5 word",
            "out.shape = ir.Shape([out.shape[0], 1, *out.shape.dims[2:]])",
            "out.shape = ir.Shape(out.shape.dims)",
        ),
    )
    plant(
        "passes/_lowerings.py",
        ("rotation backwards", "P10 passes", 'low = b("Sub"', 'low = b("Add"'),
        (
            "cosine and sine swapped in one half",
            "P10 passes",
            'b("Mul", second, cos), b("Mul", first, sin))',
            'b("Mul", second, sin), b("Mul", first, cos))',
        ),
        (
            "epsilon dropped",
            "P10 passes",
            "domain=device_ops.QTI_DOMAIN, epsilon=epsilon",
            "domain=device_ops.QTI_DOMAIN",
        ),
        ("rounded constant of the tanh", "P10 passes", "f(0.044715)", "f(0.0447)"),
        ("constant of the error function", "P10 passes", "f(math.sqrt(0.5))", "f(0.7)"),
    )
    plant(
        "passes/unflatten.py",
        ("factor of a product forgotten", "guards", 'for k in ("alpha", "beta") if k', 'for k in ("beta",) if k'),
        ("transposed Gemm taken", "guards", "or any(transposed) else None", "else None"),
        ("any axes taken for rows and tokens", "guards", "or target[0] != -1 or target[1] != _width(data)", ""),
    )
    plant(
        "passes/ort_attention.py",
        (
            "zeros written where nobody needs them",
            "node counts",
            "if 2 * list(problems.values()).count(None) < len(module.states):",
            "if list(problems.values()).count(None) < len(module.states):",
        ),
        ("any positions in the mask", "guards", "        and positions.inputs[0] is position_ids\n", ""),
        (
            "slots counted from anywhere",
            "guards",
            "(constant(numbers.inputs[0]), constant(numbers.inputs[2])) == (0, 1)",
            "constant(numbers.inputs[2]) == 1",
        ),
    )
    plant(
        "passes/ort_rotary.py",
        (
            "only cosines compared",
            "guards",
            "queries.inputs[1:] != keys.inputs[1:]",
            "queries.inputs[1] is not keys.inputs[1]",
        ),
    )
    plant(
        "passes/_rows.py",
        (
            "any reader joins heads",
            "guards",
            'if len(merges) == 1 and merges[0].op_type == "Reshape"',
            "if len(merges) == 1",
        ),
        (
            "order of a rotation forgotten",
            "guards",
            '{a.name: a.value for a in rotary.attributes.values()} | {"num_heads": heads}',
            '{"num_heads": heads}',
        ),
        (
            "any permutation behind attention",
            "guards",
            'swaps[0].op_type != "Transpose" or list(swaps[0].attributes["perm"].as_ints()) != SWAP:',
            'swaps[0].op_type != "Transpose":',
        ),
    )
    plant(
        "passes/kv_retention.py",
        (
            "full caches counted as a window",
            "guards",
            "windows = {s.window for s in module.states if s.window is not None}\n",
            "windows = {s.window for s in module.states}\n",
        ),
        (
            "any reader of a ring's slots",
            "guards",
            "if mask is None or not depends_on(mask, right) or depends_on(mask, others):",
            "if attention and (mask is None or not depends_on(mask, right) or depends_on(mask, others)):",
        ),
    )
    plant(
        "passes/legalize.py",
        (
            "newer opset not declared",
            "guards",
            'module.model.opset_imports.get("") != self.opset',
            'module.model.opset_imports.get("", 0) > self.opset',
        ),
        (
            "operators lowered that the opset has",
            "guards",
            "node.op_type in LOWERINGS and _version(node.op_type, self.opset) is None",
            "node.op_type in LOWERINGS",
        ),
        (
            "attributes of what is lowered dropped",
            "guards",
            "for name in node.attributes.keys() - lowering.takes:",
            "for name in set[str]():",
        ),
    )
    plant(
        "passes/_kv_layouts.py",
        (
            "an added mask taken for a choice",
            "guards",
            "return mask is not None and mask.dtype is ir.DataType.BOOL",
            "return mask is not None",
        ),
        (
            "one of several readers hides",
            "P11 packages",
            "all(_hides_keys(",
            "any(_hides_keys(",
        ),
    )
    plant(
        "passes/fuse_rotary.py",
        (
            "axis of heads anywhere",
            "guards",
            "unsqueeze is None or constant(unsqueeze.inputs[1]) != [1]",
            "unsqueeze is None",
        ),
        (
            "halves taken for equal",
            "P7 near misses",
            "concat.inputs[0] is not concat.inputs[1] or concat.inputs[0] is None",
            "concat.inputs[0] is None",
        ),
        ("one half in the place of both", "P7 near misses", "(start, end) == (0, half) and upper[1]", "upper[1]"),
        ("cosine for sine", "P10 passes", 'b("RotaryEmbedding", x, cos, sin)', 'b("RotaryEmbedding", x, sin, cos)'),
        ("queries only", "P7 sites", "for node in self.sites(module):", "for node in self.sites(module)[::2]:"),
    )
    plant(
        "passes/fuse_activations.py",
        (
            "another GELU taken for it",
            "P7 near misses",
            "return op.Mul(x, op.Mul(0.5, op.Add(op.Erf(op.Div(x, math.sqrt(2.0))), 1.0)))",
            "return op.Mul(x, op.Mul(0.5, op.Add(op.Erf(op.Div(x, 1.5)), 1.0)))",
        ),
        (
            "tanh form becomes the exact one",
            "P10 passes",
            'op.Gelu(x, approximate="tanh")',
            'op.Gelu(x, approximate="none")',
        ),
        ("gate of another slope", "P10 passes", "op.Swish(x, alpha=1.0)", "op.Swish(x, alpha=1.01)"),
        (
            "any gate taken for its own",
            "P7 near misses",
            "    return op.Mul(x, op.Sigmoid(x))",
            "    return op.Mul(x, op.Sigmoid(op.Mul(x, 0.5)))",
        ),
    )
    plant(
        "passes/unflatten.py",
        ("bias dropped", "P10 passes", 'product = b("Add", product, gemm.inputs[2])', "pass"),
        (
            "product said to be of its input's shape",
            "P5 shapes",
            "product.shape, product.type = node.outputs[0].shape, node.outputs[0].type",
            "product.shape, product.type = data.shape, node.outputs[0].type",
        ),
        (
            "factors of the Gemm forgotten",
            "P7 near misses",
            "any(f != 1.0 for f in factors) or any(transposed)",
            "any(transposed)",
        ),
    )
    plant(
        "passes/merge_lora.py",
        (
            "scaling of another layer",
            "merged adapters",
            "lambda old, f=factors, e=extra: old + numbers(e) * np.float32(f.scaling)",
            "lambda old, e=extra: old + numbers(e) * np.float32(factors.scaling)",
        ),
        (
            "layers of another model skipped",
            "refusals",
            'raise PassError(f"the adapter {folder} changes {path}, which the model does not have")',
            "continue",
        ),
        (
            "scaling not in the digest",
            "Auto classes",
            "for name in (CONFIG_FILE, WEIGHTS_FILE):",
            "for name in (WEIGHTS_FILE,):",
        ),
    )
    plant(
        "passes/lora.py",
        (
            "head known by its name",
            "Auto classes",
            'if layer.kind == "linear" and layer.path != head)',
            'if layer.kind == "linear" and layer.path != "lm_head")',
        ),
        ("any list of layers", "Auto classes", "pattern=self.layers_pattern)", 'pattern="")'),
        (
            "factors of a table misnamed",
            "Auto classes",
            'names = _SINGLE_EMBEDDING if kind == "embedding" else _SINGLE',
            "names = _SINGLE",
        ),
        (
            "adapter applied twice",
            "P12 adapters",
            "total = self._plus(layer.node, delta, b)",
            'total = self._plus(layer.node, b("Add", delta, delta), b)',
        ),
        (
            "adapter of the slot before",
            "P12 adapters",
            'b("Squeeze", self.ids, b.const([1])), b.const([0]))',
            'b("Sub", b("Squeeze", self.ids, b.const([1])), b.const([1])), b.const([0]))',
        ),
        (
            "all rows with the last row's adapter",
            "P12 adapters",
            'rows = b("Gather", factor, self.rows, axis=0)',
            'rows = b("Gather", factor, b("ReduceMax", self.rows, keepdims=1), axis=0)',
        ),
        (
            "layer lost for its branch",
            "P12 adapters",
            'return b("Sum", self._again(last, b), delta, shape=old.shape, dtype=old.dtype)',
            'return b("Sum", delta, shape=old.shape, dtype=old.dtype)',
        ),
        ("one layer without a branch", "P12 adapters", "for layer in found:\n", "for layer in found[2:]:\n"),
    )
    plant(
        "backends/onnxruntime/session.py",
        (
            "adapter written into all slots",
            "P12 adapters",
            "self._adapters[name].data[... if slot is None else slot] = data",
            "self._adapters[name].data[...] = data",
        ),
    )
    plant(
        "backends/ai100/emulator.py",
        ("adapters forgotten between requests", "P12 adapters", "if name not in self._adapters:", "if True:"),
    )
    plant(
        "passes/ort_attention.py",
        ("scale left to the kernel", "P10 passes", 'for n in ("scale", "softcap")', 'for n in ("softcap",)'),
        (
            "part of a mask taken for all of it",
            "P10 passes",
            '    node = made_by(mask, "LessOrEqual")\n',
            '    both = made_by(mask, "And")\n'
            '    node = made_by(mask if both is None else both.inputs[0], "LessOrEqual")\n',
        ),
        (
            "keys and values swapped",
            "P10 passes",
            "b) for w in writes]\n    attributes",
            "b) for w in writes[::-1]]\n    attributes",
        ),
        ("idle rows forgotten", "P11 packages", 'b("Where", b("Less", last, zero), kept, last)', "last"),
        (
            "a shared cache is fused",
            "P7 sites",
            "list(write.outputs[0].consumers()) != [node]",
            "node not in write.outputs[0].consumers()",
        ),
    )
    plant(
        "passes/ort_rotary.py",
        (
            "cosines for sines",
            "P10 passes",
            "for value in queries.inputs[1:]]\n",
            "for value in queries.inputs[:0:-1]]\n",
        ),
        (
            "rotated twice as far",  # by how much all are rotated together would not matter
            "P10 passes",
            "first.const(0), count, first.const(1))",
            'first.const(0), first("Add", count, count), first.const(2))',
        ),
        ("keys left as they are", "P10 passes", "enumerate((queries, keys)):", "enumerate((queries,)):"),
    )
    plant("passes/ort_kernels.py", ("slope of a gate", "P10 passes", "alpha=alpha)", "alpha=alpha * 1.001)"))
    plant("passes/fp16_clip.py", ("range of another type", "P10 passes", "FP16_MAX = 65504.0", "FP16_MAX = 2.5"))
    plant(
        "passes/canonicalize.py",
        (
            "tied weight split",
            "P5 word",
            "        dialect.attach(module.model)\n",
            "        dialect.attach(module.model)\n"
            "        for value in list(module.graph.initializers.values()):\n"
            "            uses = list(value.uses())\n"
            "            if len(uses) > 1 and len(value.shape or ()) == 2 and value.const_value is not None:\n"
            '                name = f"{value.name}.copy"\n'
            "                copy = ir.val(name, const_value=ir.tensor(value.const_value.numpy().copy(), name=name))\n"
            "                copy.metadata_props.update(value.metadata_props)\n"
            "                module.graph.register_initializer(copy)\n"
            "                uses[-1].node.replace_input_with(uses[-1].idx, copy)\n",
        ),
        ("axis kept that is another", "P10 passes", "dims.append(0)\n        elif", "dims.append(1)\n        elif"),
    )
    plant(
        "qeff_ir/passing/manager.py",
        (
            "failure leaves half a pass",
            "P6 transaction",
            "for part in fields(module):",
            "for part in fields(module)[1:]:",
        ),
        (
            "changes not noticed",
            "P5 word",
            "modified = after != before or not checks.same_weights(snapshot, module)",
            "modified = False",
        ),
    )
    plant(
        "qeff_ir/passing/rewriter.py",
        (
            "equal bytes of other constants",
            "P10 passes",
            "digest = hashlib.sha256(array.tobytes())",
            "digest = hashlib.sha256(b'')",
        ),
    )
    plant(
        "qeff_ir/verifier.py",
        (
            "shapes of states not compared",
            "P4 verifier",
            "if value.dtype != state.dtype or _dims(value) != state.shape:",
            "if value.dtype != state.dtype:",
        ),
        (
            "order not checked",
            "P4 verifier",
            "if value is not None and value not in defined:",
            "if value is not None and value in ():",
        ),
        (
            "missing sizes not told",
            "P4 verifier",
            "if specialization.symbols.get(dim, 0) < 1:",
            "if specialization.symbols.get(dim, 1) < 1:",
        ),
    )
    plant(
        "qeff_ir/verifier.py",
        (
            "operators of other opsets taken",
            "P13 orders",
            "if not onnx.defs.has(node.op_type, opset, node.domain):",
            "if False:",
        ),
    )
    plant(
        "qeff_ir/printer.py",
        ("rings not printed", "P1 text", 'marks += ["ring"] if state.ring else []', "marks += []"),
        (
            "attributes not printed",
            "P1 text",
            'for a in plain) + "}" if plain else',
            'for a in plain) + "}" if not plain else',
        ),
    )
    plant(
        "passes/last_logits.py",
        (
            "one token chosen twice",
            "P14 sequences",
            "if logits.shape is not None and logits.shape[1] == 1:",
            "if False:",
        ),
    )
    plant(
        "passes/_kv_layouts.py",
        (
            "last position of all rows",
            "P12 rows",
            'b("ReduceMax", self.position_ids, b.const([1]), keepdims=1)',
            'b("ReduceMax", self.position_ids, b.const([0, 1]), keepdims=1)',
        ),
    )
    plant(
        "qeff_ir/module.py",
        ("windows lost on loading", "P2 saved", 's["window"],', "None,"),
        ("outputs shared by a clone", "P2 saved", "model = self.model.clone()", "model = self.model"),
    )
    plant(
        "qeff_ir/dialect.py",
        (
            "first token not stored",
            "slots",
            "stored = op.And(op.GreaterOrEqual(position_ids,",
            "stored = op.And(op.Greater(position_ids,",
        ),
        (
            "ring positions a turn behind",
            "slots",
            "op.Where(op.LessOrEqual(this_turn, last), this_turn",
            "op.Where(op.Less(this_turn, last), this_turn",
        ),
        (
            "sink keeps its weight",
            "P10 passes",
            "scores = op.Where(op.Unsqueeze(mask, one), scores,",
            "scores = op.Where(op.Unsqueeze(mask, one), op.Abs(scores),",
        ),
    )
    plant(
        "qeff_ir/dialect.py",
        (
            "padding in the convolution's window",
            "P11 packages",
            "real = op.Cast(op.GreaterOrEqual(position_ids, op.Constant(value_int=0)), to=7)",
            "real = op.Cast(op.GreaterOrEqual(position_ids, op.Constant(value_int=-1)), to=7)",
        ),
        (
            "convolution sees the request before",
            "P10 passes",
            "before = op.Where(starts, op.CastLike(op.Constant(value_float=0.0), past), past)",
            "before = op.Identity(past)",
        ),
        (
            "recurrence goes on from the request before",
            "P10 passes",
            "op.Where(starts, zero, past), body=token)",
            "op.Identity(past), body=token)",
        ),
        (
            "state fades on padding",
            "P11 packages",
            "kept = op.Where(padded, one, op.Exp(decay))",
            "kept = op.Exp(decay)",
        ),
        (
            "delta rule forgets what it knows",
            "P10 passes",
            "known = op.Mul(op.MatMul(row, faded), rule)",
            "known = op.Mul(op.MatMul(row, state), rule)",
        ),
    )
    plant(
        "qeff_ir/device_ops.py",
        (
            "norm without its scale",
            "P10 passes",
            "op.CastLike(op.Mul(scale, op.Cast(normal, to=1)), hidden_states)",
            "op.CastLike(op.Cast(normal, to=1), hidden_states)",
        ),
    )
    plant(
        "backends/ai100/device_rules.py",
        (
            "slot 0 skipped",
            "P11 packages",
            "valid = op.And(op.GreaterOrEqual(position_ids,",
            "valid = op.And(op.Greater(position_ids,",
        ),
    )
    plant(
        "backends/ai100/emulator.py",
        ("states not kept", "P11 packages", "self._states, self._spare = self._spare, self._states", "pass"),
        (
            "bias fused into a product where no adapter is",
            "P12 adapters",
            '_FUSE_BIASES = ["MatMulAddFusion", "SkipLayerNormFusion"]',
            '_FUSE_BIASES = ["SkipLayerNormFusion"]',
        ),
    )
    plant(
        "backends/ai100/emit.py",
        (
            "precision of inputs only",
            "P15 targets",
            "for name in (state.input, state.output)]",
            "for name in (state.input,)]",
        ),
    )
    plant(
        "backends/onnxruntime/session.py",
        (
            "states not written",
            "P11 packages",
            "io.bind_ortvalue_output(output, value)",
            'io.bind_output(output, "cpu")',
        ),
        (
            "bias fused where no adapter is",
            "P12 adapters",
            '_FUSE_BIASES = ["SkipLayerNormFusion"]',
            "_FUSE_BIASES: list[str] = []",
        ),
        (
            "states of other layers bound",
            "P11 packages",
            "io.bind_ortvalue_input(name, value)",
            "io.bind_ortvalue_input(name, self._states[max(self._states)][1] if list(value.shape()) == list(self._states[max(self._states)][1].shape()) else value)",
        ),
    )
    plant(
        "qeff_ir/runtime/decoder.py",
        ("position not advanced", "P11 driver", "self.positions + 1, -1)", "self.positions, -1)"),
        ("short prompts first", "P11 driver", "start = (chunks - -(-len(tokens) // chunk)) * chunk", "start = 0"),
        (
            "positions off by one",
            "P11 driver",
            "positions[row, start : start + len(tokens)] = np.arange(len(tokens))",
            "positions[row, start : start + len(tokens)] = np.arange(len(tokens)) + 1",
        ),
        (
            "one step too many",
            "P11 driver",
            "if int(self.positions.max()) >= self.ctx_len:",
            "if int(self.positions.max()) > self.ctx_len:",
        ),
    )
    plant(
        "qeff_ir/compiler.py",
        ("context one slot short", "P15 targets", '"ctx_len": options.ctx_len}', '"ctx_len": options.ctx_len - 1}'),
    )
    plant(
        "qeff_ir/frontend/capture.py",
        ("scale a percent off", "P10 frontend", "scale = float(scaling) if", "scale = 1.01 * float(scaling) if"),
        (
            "query sees the next token",
            "P10 frontend",
            "mask_function(batch, head, position_ids[:, None, :, None],",
            "mask_function(batch, head, position_ids[:, None, :, None] + 1,",
        ),
    )
    plant(
        "qeff_ir/frontend/states.py",
        ("keys for values", "P10 frontend", "return self.keys, self.values", "return self.values, self.keys"),
        (
            "window one token wider",
            "P10 frontend",
            "int(kind.sliding_window) if",
            "int(kind.sliding_window) + 1 if",
        ),
    )
    return found


FAULTS = _faults()
