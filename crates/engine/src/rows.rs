//! Single rows of a table that is too large for the device, or for memory.

use checkpoint::mmap::{MappedBytes, MappedFile};
use checkpoint::orbax::OrbaxCheckpoint;
use fs_err as fs;
use tensor::{DType, HostArray};

use crate::convert::{Checkpoint, Convention, Param};
use crate::{EngineError, Model, Result};

/// Part of a table.
#[derive(Debug)]
enum Tile {
    /// In a mapped file.
    Mapped(MappedBytes),
    /// In memory.
    Held(HostArray),
}

impl Tile {
    fn bytes(&self) -> &[u8] {
        match self {
            Tile::Mapped(bytes) => bytes.as_slice(),
            Tile::Held(array) => array.bytes(),
        }
    }
}

/// A matrix `[rows, columns]` on the host, of which rows are gathered. That of a checkpoint lies in mapped files, so that
/// what is not looked up takes no memory.
#[derive(Debug)]
pub struct RowTable {
    dtype: DType,
    rows: usize,
    columns: usize,
    /// Extent of a tile; those at the edge are smaller.
    tile: [usize; 2],
    /// Row-major; each dense.
    tiles: Vec<Tile>,
    spooled: u64,
}

impl RowTable {
    /// Finds the rows of a parameter with two dimensions. Where it is stored as it is needed, in one piece or in chunks,
    /// it is used in place, every checksum verified; else it is written to a temporary file, which has no name and goes
    /// with this value.
    ///
    /// # Errors
    /// When there is no such parameter, it is damaged, or there is no room for a temporary file.
    pub fn new(model: &Model, name: &str) -> Result<Self> {
        let table = Self::streamed(model, name)?;
        for tile in &table.tiles {
            // Rows are looked up all over the table: reading ahead would only fill memory.
            if let Tile::Mapped(bytes) = tile {
                bytes.advise_random();
            }
        }
        Ok(table)
    }

    /// As [`new`](Self::new), for a table that is also read from one end to the other.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn streamed(model: &Model, name: &str) -> Result<Self> {
        let weights = model.weights();
        let param = weights.params.iter().find(|p| p.spec.name == name);
        let (param, &[rows, columns]) = (match param {
            Some(p) => (p, p.spec.shape.dims()),
            None => return Err(EngineError::Input(format!("{name} is no parameter of {}", model.path().display()))),
        }) else {
            return Err(EngineError::Input(format!("{name} has no rows")));
        };
        let whole = |bytes, spooled| RowTable {
            dtype: param.hf_dtype,
            rows,
            columns,
            tile: [rows.max(1), columns.max(1)],
            tiles: vec![Tile::Mapped(bytes)],
            spooled,
        };
        let mut table = match &weights.checkpoint {
            Checkpoint::Hf(_) => model.mapped(name).map(|view| whole(view.bytes, 0)),
            Checkpoint::Orbax(c) => {
                let plain = param.dtype == param.hf_dtype
                    && weights.op(&param.spec, Convention::Hf) == checkpoint::copy::Op::Copy;
                let found = if plain { chunks(c, param, [rows, columns])? } else { None };
                found.map(|(tile, tiles)| {
                    let tiles = tiles.into_iter().map(Tile::Mapped).collect();
                    RowTable { dtype: param.hf_dtype, rows, columns, tile, tiles, spooled: 0 }
                })
            }
        };
        match table.take() {
            Some(table) => Ok(table),
            None => {
                let (bytes, size) = spool(model, name)?;
                Ok(whole(bytes, size))
            }
        }
    }

    /// A table that is in memory and nowhere else.
    ///
    /// # Errors
    /// When the array does not have two dimensions.
    pub fn in_memory(array: HostArray) -> Result<Self> {
        let &[rows, columns] = array.shape().dims() else {
            return Err(EngineError::Input(format!("an array of shape {} has no rows", array.shape())));
        };
        let (dtype, tile) = (array.dtype(), [rows.max(1), columns.max(1)]);
        Ok(RowTable { dtype, rows, columns, tile, tiles: vec![Tile::Held(array)], spooled: 0 })
    }

    /// All rows.
    ///
    /// # Errors
    /// When there are more than ids can number.
    pub fn whole(&self) -> Result<HostArray> {
        let rows = i32::try_from(self.rows).map_err(|_| EngineError::Input(format!("{} rows", self.rows)))?;
        self.gather(&(0..rows).collect::<Vec<_>>(), [self.rows, self.columns])
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Width of a row in elements.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes that were written to a temporary file.
    #[must_use]
    pub fn spooled(&self) -> u64 {
        self.spooled
    }

    /// The rows `ids`, one after the other: `[ids, columns]` under the shape given.
    ///
    /// # Errors
    /// When an id is no row, or the shape has another number of elements.
    pub fn gather(&self, ids: &[i32], shape: impl Into<tensor::Shape>) -> Result<HostArray> {
        let mut out = HostArray::zeros(self.dtype, shape)?;
        let size = self.dtype.size();
        let width = self.columns * size;
        let outside = || EngineError::Input(format!("rows outside of a table of {} x {}", self.rows, self.columns));
        if ids.len().checked_mul(width) != Some(out.bytes().len()) {
            return Err(outside());
        }
        let across = self.columns.div_ceil(self.tile[1]);
        for (&id, row) in ids.iter().zip(out.bytes_mut().chunks_exact_mut(width.max(1))) {
            let id = usize::try_from(id).ok().filter(|&i| i < self.rows).ok_or_else(outside)?;
            let (first, within) = (id / self.tile[0] * across, id % self.tile[0]);
            for (t, part) in row.chunks_mut(self.tile[1] * size).enumerate() {
                let at = within * part.len();
                let source = self.tiles.get(first + t).and_then(|b| b.bytes().get(at..at + part.len()));
                part.copy_from_slice(source.ok_or_else(outside)?);
            }
        }
        Ok(out)
    }
}

type Tiles = ([usize; 2], Vec<MappedBytes>);

/// The chunks of an array in place in mapped files; `None` if one is not stored as it is needed.
fn chunks(checkpoint: &OrbaxCheckpoint, param: &Param, shape: [usize; 2]) -> Result<Option<Tiles>> {
    let name = &param.from;
    let Some(info) = checkpoint.array(name) else { return Ok(None) };
    let (&[down, across], &[high, wide]) = (checkpoint.grid(name)?.as_slice(), info.chunk_shape.as_slice()) else {
        return Ok(None);
    };
    let mut tiles = Vec::with_capacity(down * across);
    for i in 0..down {
        for j in 0..across {
            let Some(bytes) = checkpoint.mapped_chunk(name, &[i, j])? else { return Ok(None) };
            // The checksum has gone through all pages; they need not stay.
            bytes.advise_dont_need();
            let extent = |at: usize, chunk: usize, all: usize| all.saturating_sub(at * chunk).min(chunk);
            let elements = extent(i, high, shape[0]) * extent(j, wide, shape[1]);
            if bytes.as_slice().len() != elements * info.dtype.size() {
                return Ok(None);
            }
            tiles.push(bytes);
        }
    }
    Ok(Some(([high.max(1), wide.max(1)], tiles)))
}

/// Writes a parameter to a temporary file and maps it.
fn spool(model: &Model, name: &str) -> Result<(MappedBytes, u64)> {
    let dir = std::env::temp_dir();
    let named = |e: std::io::Error| EngineError::File {
        path: dir.clone(),
        reason: format!(
            "{name} is not stored as its rows are needed and no temporary copy can be made: {e} (TMPDIR names another place)"
        ),
    };
    let mut file = tempfile::Builder::new().prefix("lapidary-rows-").tempfile_in(&dir).map_err(named)?;
    let mut buffer = Vec::new();
    model.read_pieces(name, (4 << 20, 1), &mut |reader, region| {
        reader.read(region, &mut buffer)?;
        std::io::Write::write_all(&mut file, &buffer).map_err(named)
    })?;
    let mapped = MappedFile::open(file.path()).map_err(named)?;
    let size = fs::metadata(file.path()).map_err(named)?.len();
    let bytes = mapped.bytes(0..mapped.len()).ok_or_else(|| EngineError::Input(format!("{name} is empty")))?;
    Ok((bytes, size))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use checkpoint::copy::CopyOptions;
    use checkpoint::orbax::OrbaxOptions;
    use gemma4::params::EMBED_TOKENS_PER_LAYER;
    use gemma4::{Arch, param_table};

    use super::*;
    use crate::convert::{Hints, Settings, Weights, plan};
    use crate::init::{InitOptions, write_random};

    /// A checkpoint whose tables are large enough for MaxText's 16 chunks.
    fn write(dir: &Path) -> Arch {
        let words = [
            "model_name=tiny-e2b",
            "vocab_size=16384",
            "vocab_size_per_layer_input=16384",
            "override_model_config=true",
        ];
        let config = config::Sources::from_args(words.map(str::to_owned)).resolve().unwrap();
        let arch = Arch::from_config(&config).unwrap();
        write_random(dir, &arch, &InitOptions { vary_norms: true, ..InitOptions::default() }, |_| {}).unwrap();
        arch
    }

    fn convert(from: &Path, to: &Path, orbax: OrbaxOptions) -> Model {
        let source = Weights::open(from, &Hints::default()).unwrap();
        let settings = Settings { to: Convention::Maxtext, orbax, ..Settings::default() };
        let plan = plan(&source, None, to, &settings).unwrap();
        plan.run(&CopyOptions::default(), &|_| std::ops::ControlFlow::Continue(())).unwrap();
        Model::open(to).unwrap()
    }

    #[test]
    fn rows_and_parameters_are_the_same_in_every_layout() {
        let tmp = tempfile::tempdir().unwrap();
        let hf = tmp.path().join("hf");
        let arch = write(&hf);
        let want = Model::open(&hf).unwrap();
        let zstd = OrbaxOptions { zstd: Some(1), ..OrbaxOptions::default() };
        let ids = [0, 16383, 1023, 1024, 1025, 1, 1, 2048];
        let rows = RowTable::new(&want, EMBED_TOKENS_PER_LAYER).unwrap();
        let shape = [ids.len(), rows.columns()];
        let gathered = rows.gather(&ids, shape).unwrap();
        let view = want.mapped(EMBED_TOKENS_PER_LAYER).unwrap();
        let width = rows.columns() * view.dtype.size();
        assert_eq!(gathered.bytes()[width..2 * width], view.bytes[16383 * width..]);
        let held = RowTable::in_memory(want.read(EMBED_TOKENS_PER_LAYER).unwrap()).unwrap();
        assert!(held.gather(&ids, shape).unwrap().bytes() == gathered.bytes());
        assert!(held.whole().unwrap().bytes() == rows.whole().unwrap().bytes());
        assert!(RowTable::in_memory(want.read("norm.weight").unwrap()).is_err());
        for (name, options, in_place) in [
            ("plain", OrbaxOptions::default(), true),
            ("zstd", zstd, false),
            ("pathways", OrbaxOptions::pathways(), false),
        ] {
            let got = convert(&hf, &tmp.path().join(name), options);
            assert_eq!(got.arch(), &arch);
            for p in param_table(&arch) {
                let (a, b) = (want.read(&p.name).unwrap(), got.read(&p.name).unwrap());
                assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()), "{name} {}", p.name);
                assert!(a.bytes() == b.bytes(), "{name}: {} differs", p.name);
                assert_eq!(got.dtype(&p.name).unwrap(), b.dtype());
            }
            let table = RowTable::new(&got, EMBED_TOKENS_PER_LAYER).unwrap();
            assert_eq!(table.tiles.len(), if in_place { 16 } else { 1 }, "{name}");
            assert_eq!(table.spooled() == 0, in_place, "{name}");
            assert!(table.gather(&ids, shape).unwrap().bytes() == gathered.bytes(), "{name}");
            assert!(table.gather(&[16384], [1, rows.columns()]).is_err());
            assert!(table.gather(&[-1], [1, rows.columns()]).is_err());
            assert!(table.gather(&ids, [1, rows.columns()]).is_err());
        }
        assert!(want.read("layers.99.norm").is_err() && RowTable::new(&want, "norm.weight").is_err());
    }

    #[test]
    fn damage_in_the_table_is_found_before_a_row_is_read() {
        let tmp = tempfile::tempdir().unwrap();
        let (hf, mt) = (tmp.path().join("hf"), tmp.path().join("mt"));
        write(&hf);
        drop(convert(&hf, &mt, OrbaxOptions::default()));
        let name = "params.params.decoder.per_layer_embedder.embed_tokens_per_layer";
        let bytes = OrbaxCheckpoint::open(&mt).unwrap().mapped_chunk(name, &[0, 0]).unwrap().unwrap();
        let (path, at) = (bytes.file().path().to_owned(), bytes.range().start + 100);
        let mut file = fs::read(&path).unwrap();
        file[at] ^= 16;
        fs::write(&path, file).unwrap();
        let model = Model::open(&mt).unwrap();
        let error = RowTable::new(&model, EMBED_TOKENS_PER_LAYER).unwrap_err().to_string();
        assert!(error.contains("embed_tokens_per_layer") && error.contains("chunk"), "{error}");
        assert!(model.read(EMBED_TOKENS_PER_LAYER).is_err());
    }
}
