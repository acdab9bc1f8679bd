#!/usr/bin/env python3
"""Compares this project's checkpoint reader and writer with the real Orbax, in both directions.

Environment (any Python from 3.10 on; runs on CPU):

    python -m venv orbax-venv
    orbax-venv/bin/pip install orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax flax numpy ml_dtypes

Use:

    cargo build --release -p lapidary-checkpoint --example orbax_pattern
    orbax-venv/bin/python scripts/interop_orbax.py all --tool target/release/examples/orbax_pattern

`all` writes into a temporary directory and does two things. (a) The tool writes checkpoints with every option, and
Orbax restores them through three of its interfaces; every array must be bit-equal. (b) Orbax writes checkpoints in
its four container forms, for one device and for a mesh of eight, and the tool reads them; every array must be bit-equal.
The exit code is 0 only if all of it holds.

`samples DIR` writes the tiny checkpoints that the Rust tests keep (crates/checkpoint/tests/orbax/samples).

No expected values are stored anywhere: they follow from the name of the array, see `pattern`.
"""

import argparse
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

# Before JAX is imported: eight devices on one CPU, and 64-bit types.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

jax.config.update("jax_enable_x64", True)


def pattern(name, shape, dtype):
    """The values that the array of this name must have.

    Element i is v - 125 for a hash v < 251 of i and the sum of the name's bytes: every element type holds it exactly, and it
    hardly compresses. Unsigned types hold v, booleans whether it is odd.
    """
    dtype = np.dtype(dtype)
    x = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64)
    x = (x * np.uint64(2654435761) + np.uint64(sum(name.encode()) * 40503)) & np.uint64(0xFFFFFFFF)
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    v = ((x ^ (x >> np.uint64(13))) % np.uint64(251)).astype(np.int64)
    if dtype == np.bool_:
        v = v % 2
    elif dtype.kind != "u":
        v = v - 125
    return v.astype(dtype).reshape(shape)


BF16 = ml_dtypes.bfloat16

# Parameters below params.params: name, shape, dtype, mesh axes of each dimension.
PARAMS = [
    ("token_embedder.embedding", (64, 24), BF16, ("x", None)),
    ("decoder.layers_0.mlp.wi_0.kernel", (16, 24), np.float32, ("y", "x")),
    ("decoder.layers_0.attn.query.kernel", (8, 4, 6), BF16, ("x", None, "y")),
    ("decoder.layers_0.scale", (33,), np.float32, (None,)),
    ("decoder.layers_0.layer_scalar", (1,), BF16, (None,)),
    ("scalar", (), np.float32, ()),
    ("half", (5, 3), np.float16, (None, None)),
    ("double", (3, 2), np.float64, (None, None)),
    ("i8", (6, 3), np.int8, (None, None)),
    ("i16", (7,), np.int16, (None,)),
    ("i32", (4, 5), np.int32, ("x", None)),
    ("i64", (4,), np.int64, (None,)),
    ("u8", (9,), np.uint8, (None,)),
    ("u16", (3,), np.uint16, (None,)),
    ("u32", (3,), np.uint32, (None,)),
    ("u64", (3,), np.uint64, (None,)),
    ("flag", (10,), np.bool_, (None,)),
]


def nest(flat):
    tree = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for p in parents:
            node = node.setdefault(p, {})
        node[last] = value
    return tree


def flatten(tree, prefix=""):
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = ((str(i), v) for i, v in enumerate(tree))
    else:
        return {prefix[:-1]: tree}
    out = {}
    for k, v in items:
        out.update(flatten(v, f"{prefix}{k}."))
    return out


def params(scale=1, mesh=None):
    """The parameters, their first dimension `scale` times as large, on a mesh if there is one."""
    out = {}
    for name, shape, dtype, axes in PARAMS:
        if len(shape) > 1:
            shape = (shape[0] * scale, *shape[1:])
        value = pattern(name, shape, dtype)
        if mesh is not None:
            value = jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes)))
        out[name] = value
    return nest(out)


def train_state(mesh=None, optimizer=False, scale=1):
    state = {"step": np.int64(0) if mesh is None else jax.numpy.int32(7), "params": {"params": params(scale, mesh)}, "opt_state": {}}
    if optimizer:
        moments = {"token_embedder": state["params"]["params"]["token_embedder"]}
        state["opt_state"] = [{"count": np.int32(3), "mu": {"params": moments}}, None]
    return state


def save_step(base, state, ocdbt=True, zarr3=True, step=0, item="items"):
    """Saves as MaxText does: a manager with one named item, custom metadata with scan_layers."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(item, ocp.args.PyTreeSave, handler)
    registry.add(item, ocp.args.PyTreeRestore, handler)
    with ocp.CheckpointManager(base, options=options, handler_registry=registry) as manager:
        manager.save(step, args=ocp.args.Composite(**{item: ocp.args.PyTreeSave(state)}), custom_metadata={"scan_layers": False})
        manager.wait_until_finished()


FORMS = [("ocdbt_zarr3", True, True), ("ocdbt_zarr2", True, False), ("files_zarr3", False, True), ("files_zarr2", False, False)]


def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


def write_samples(root, scale=1):
    """Every form of checkpoint that the reader must know; gives their paths."""
    root = pathlib.Path(root).absolute()
    made = []
    for name, ocdbt, zarr3 in FORMS:
        save_step(root / name, train_state(scale=scale), ocdbt, zarr3)
        made.append(root / name)
    save_step(root / "mesh", train_state(mesh(), optimizer=True, scale=scale), step=12)
    made.append(root / "mesh")
    # What an interrupted merge leaves behind.
    shutil.copytree(root / "ocdbt_zarr3", root / "unmerged")
    items = root / "unmerged/0/items"
    (items / "manifest.ocdbt").unlink()
    shutil.rmtree(items / "d")
    made.append(root / "unmerged")
    # Parameters alone, and the trees of fine-tuning.
    with ocp.PyTreeCheckpointer() as c:
        c.save(root / "params_only", {"params": params(scale)}, force=True)
        made.append(root / "params_only")
        small = {n: pattern(n, s, d) for n, s, d, _ in PARAMS[:3]}
        value = nest({f"{n}.value": v for n, v in small.items()})
        c.save(root / "nnx", value, force=True)
        c.save(root / "nnx_base", {"base": value}, force=True)
        made += [root / "nnx", root / "nnx_base"]
    with ocp.StandardCheckpointer() as c:
        c.save(root / "standard", {"params": params(scale)}, force=True)
        c.wait_until_finished()
        made.append(root / "standard")
    return made


def two_processes(root, scale=1):
    """A job of two processes with four devices each, and the same with its stores not merged."""
    root = pathlib.Path(root).absolute()
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, __file__, "worker", str(root / "processes"), str(port), str(scale)]
    workers = [subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.DEVNULL) for i in range(2)]
    if any(w.wait(timeout=300) for w in workers):
        raise RuntimeError("a process of the two failed")
    shutil.copytree(root / "processes", root / "processes_unmerged")
    items = root / "processes_unmerged/12/items"
    (items / "manifest.ocdbt").unlink()
    shutil.rmtree(items / "d")
    return [root / "processes", root / "processes_unmerged"]


def worker(base, port, scale, index):
    """One of the two processes."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    grid = mesh()

    def spread(name, shape, dtype, axes):
        if len(shape) > 1:
            shape = (shape[0] * scale, *shape[1:])
        value = pattern(name, shape, dtype)
        return jax.make_array_from_callback(shape, NamedSharding(grid, PartitionSpec(*axes)), lambda i: value[i])

    state = {"step": np.int32(7), "params": {"params": nest({p[0]: spread(*p) for p in PARAMS})}, "opt_state": {}}
    save_step(pathlib.Path(base), state, step=12)


def write_stores(root):
    """Generic stores of the underlying library: a deep tree with many versions, and numbered manifests."""
    import tensorstore as ts

    made = []
    for name, writes, config in [
        ("deep", 24, {"max_decoded_node_bytes": 200, "max_inline_value_bytes": 8, "version_tree_arity_log2": 1}),
        ("numbered", 5, {"manifest_kind": "numbered"}),
    ]:
        path = pathlib.Path(root).absolute() / name
        kv = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/", "config": config}).result()
        for i in range(writes):
            kv.write(f"key/{i * 37 % 101:03}", f"value {i}".encode() * (i % 4)).result()
        made.append(path)
    return made


def write_codecs(root):
    """Arrays in encodings that the underlying library knows and Orbax does not use today."""
    import tensorstore as ts

    little, big, crc = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}
    zstd = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}

    def transpose(*order):
        return {"name": "transpose", "configuration": {"order": list(order)}}

    def shard(shape, codecs, **more):
        return {"name": "sharding_indexed", "configuration": {"chunk_shape": shape, "codecs": codecs, "index_codecs": [little, crc], **more}}

    v3 = {
        "shard": [shard([4, 3], [little])],
        "shard_checked": [shard([4, 3], [big, crc], index_location="start")],
        "shard_turned": [transpose(1, 0), shard([6, 4], [transpose(1, 0), little, zstd])],
        "shard_nested": [shard([4, 6], [shard([2, 3], [little, crc])])],
        "big": [big],
        "turned": [transpose(1, 0), little, crc],
        "turned_packed": [transpose(1, 0), big, zstd, crc],
        "checked_packed": [little, crc, zstd],
    }
    path = pathlib.Path(root).absolute()

    def write(name, driver, metadata, part=None):
        spec = {"driver": driver, "kvstore": f"file://{path}/params.{name}/", "metadata": metadata, "store_data_equal_to_fill_value": True}
        array = ts.open(spec, create=True).result()
        value = pattern(name, (13, 10), array.dtype.numpy_dtype)
        if part:
            array[part].write(value[part]).result()
        else:
            array.write(value).result()

    def v3_metadata(codecs, dtype="float32"):
        grid = {"name": "regular", "configuration": {"chunk_shape": [8, 12]}}
        return {"shape": [13, 10], "chunk_grid": grid, "chunk_key_encoding": {"name": "default"}, "data_type": dtype, "codecs": codecs}

    for name, codecs in v3.items():
        write(name, "zarr3", v3_metadata(codecs))
    write("partial", "zarr3", v3_metadata([shard([4, 3], [little])]), part=(slice(0, 13), slice(0, 6)))
    write("zipped", "zarr3", v3_metadata([little, {"name": "gzip", "configuration": {"level": 1}}]))
    for name, dtype, order, compressor in [("old_f", ">f4", "F", None), ("old_packed", ">i2", "C", {"id": "zstd", "level": 1})]:
        write(name, "zarr", {"shape": [13, 10], "chunks": [5, 6], "dtype": dtype, "order": order, "compressor": compressor})
    write("old_blosc", "zarr", {"shape": [13, 10], "chunks": [5, 6], "dtype": "<f4", "compressor": {"id": "blosc"}})


def equal(found, name):
    found = np.asarray(found)
    want = pattern(name, found.shape, found.dtype)
    return found.tobytes() == want.tobytes()


def compare(tree, what, errors, strip="params.params."):
    """Compares a restored tree with the pattern."""
    flat = {n: v for n, v in flatten(tree).items() if n.startswith(strip)}
    wrong = [n for n, v in flat.items() if not equal(v, n.removeprefix(strip))]
    if wrong or not flat:
        errors.append(f"{what}: {len(wrong)} of {len(flat)} arrays differ: {wrong[:5]}")
    print(f"{'FAIL' if wrong or not flat else 'ok  '} {what}: {len(flat)} arrays")


def orbax_reads_ours(tool, root, errors):
    for form in subprocess.run([tool, "forms"], check=True, capture_output=True, text=True).stdout.split():
        base = root / f"ours_{form}"
        subprocess.run([tool, "write", base, form], check=True)
        items = base / "0/items"
        compare(ocp.PyTreeCheckpointer().restore(items), f"{form}, PyTreeCheckpointer", errors)
        compare(ocp.StandardCheckpointer().restore(items), f"{form}, StandardCheckpointer", errors)
        handler = ocp.PyTreeCheckpointHandler()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("items", ocp.args.PyTreeRestore, handler)
        with ocp.CheckpointManager(base, handler_registry=registry) as manager:
            restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(items=ocp.args.PyTreeRestore()))
            compare(restored["items"], f"{form}, CheckpointManager", errors)
            if manager.metadata(0).custom_metadata.get("scan_layers") is not False:
                errors.append(f"{form}: custom metadata of the step is {manager.metadata(0).custom_metadata}")
        # On to a mesh, cast on the way.
        tree = ocp.PyTreeCheckpointer().metadata(items).item_metadata.tree
        sharding = NamedSharding(mesh(), PartitionSpec())
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), tree)
        compare(ocp.StandardCheckpointer().restore(items, target), f"{form}, onto a mesh", errors)


def we_read_orbax(tool, root, errors):
    paths = write_samples(root / "theirs") + write_samples(root / "theirs_large", scale=64)
    paths += two_processes(root / "theirs") + two_processes(root / "theirs_large", scale=64)
    for path in paths:
        done = subprocess.run([tool, "check", path], capture_output=True, text=True)
        print(f"{'ok  ' if done.returncode == 0 else 'FAIL'} reading {path.parent.name}/{path.name}: {done.stdout.strip() or done.stderr.strip()}")
        if done.returncode != 0:
            errors.append(f"reading {path}: {done.stderr}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    every = commands.add_parser("all", help="both directions")
    every.add_argument("--tool", required=True, type=pathlib.Path, help="the built example orbax_pattern")
    samples = commands.add_parser("samples", help="the checkpoints kept for the Rust tests")
    samples.add_argument("dir", type=pathlib.Path)
    work = commands.add_parser("worker", help="(one process of a job, started by the others)")
    for name, kind in [("base", str), ("port", int), ("scale", int), ("index", int)]:
        work.add_argument(name, type=kind)
    args = parser.parse_args()
    if args.command == "worker":
        worker(args.base, args.port, args.scale, args.index)
        return 0
    if args.command == "samples":
        # Orbax writes the directory's name into some files; it should be the same on every machine.
        neutral = pathlib.Path("/tmp/samples")
        shutil.rmtree(neutral, ignore_errors=True)
        write_samples(neutral)
        two_processes(neutral)
        for derived in neutral.glob("*unmerged"):
            # The tests make these themselves.
            shutil.rmtree(derived)
        # Large, and not needed to read the arrays.
        (neutral / "processes/12/items/_sharding").unlink()
        write_stores(neutral / "stores")
        write_codecs(neutral / "codecs")
        shutil.copytree(neutral, args.dir)
        shutil.rmtree(neutral)
        return 0
    errors = []
    with tempfile.TemporaryDirectory() as tmp:
        orbax_reads_ours(args.tool.absolute(), pathlib.Path(tmp), errors)
        we_read_orbax(args.tool.absolute(), pathlib.Path(tmp), errors)
    for e in errors:
        print(e, file=sys.stderr)
    print(f"{len(errors)} failures; orbax-checkpoint {ocp.__version__}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
