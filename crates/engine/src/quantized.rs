//! Weights as whole numbers with scales: the formats, and how a model directory says that it stores them
//! (`docs/reference/quantization.md`).

use std::borrow::Cow;

use ::kernels::Format;
use gemma4::cached::called_matrices;
use gemma4::params::EMBED_TOKENS;
use gemma4::{Arch, param_table};
use serde_json::{Value, json};
use tensor::{DType, Shape};

/// The entry of config.json that says how weights are stored.
const ENTRY: &str = "quantization_config";
/// Whose format it is.
const METHOD: &str = "lapidary";
/// Version of the stored form that is written and read.
pub const VERSION: u64 = 1;
/// The head's matrix in tiles. The same numbers lie in the token table, whose rows are looked up as they are.
pub const HEAD_TILES: &str = "embed_tokens.tiles";

/// A narrower form of weights: whole numbers with a scale for each group of columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// 8 bits a number.
    Int8,
    /// 4 bits a number.
    Int4,
}

impl Quantization {
    const ALL: [Quantization; 2] = [Quantization::Int8, Quantization::Int4];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Quantization::Int8 => "int8",
            Quantization::Int4 => "int4",
        }
    }

    /// As the kernels know it.
    pub(crate) const fn format(self) -> Format {
        match self {
            Quantization::Int8 => Format::Int8,
            Quantization::Int4 => Format::Int4,
        }
    }

    /// Columns of a row that share a scale.
    #[must_use]
    pub fn group(self) -> usize {
        self.format().group().unwrap_or(0)
    }
}

impl std::str::FromStr for Quantization {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|q| q.name() == s).ok_or_else(|| format!("{s:?} is neither int8 nor int4"))
    }
}

/// What a directory with quantised weights says of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// How they are stored.
    pub format: Quantization,
    /// The element type that they had.
    pub dtype: DType,
}

/// What is stored in a directory for a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    /// As it was: name and shape.
    pub(crate) plain: Option<(String, Shape)>,
    /// In tiles: name, and tiles, blocks and bytes of a block.
    pub(crate) tiles: Option<(String, Shape)>,
}

impl Stored {
    /// Reads a config.json. `None`: it says nothing of quantisation, or of one that is not ours.
    ///
    /// # Errors
    /// With a sentence, when it is ours and this program cannot read it.
    pub fn of(config: &Value) -> Result<Option<Self>, String> {
        let Some(entry) = config.get(ENTRY).filter(|e| e.get("quant_method").is_some_and(|m| m == METHOD)) else {
            return Ok(None);
        };
        let field = |name: &str| entry.get(name).unwrap_or(&Value::Null);
        if *field("version") != json!(VERSION) {
            return Err(format!(
                "{ENTRY}: version {} of the stored form is not known, this program reads version {VERSION}; quantize the \
                 model again, or use the program that wrote it",
                field("version")
            ));
        }
        let format = field("format").as_str().unwrap_or_default().parse::<Quantization>();
        let format = format.map_err(|e| format!("{ENTRY}: format {e}"))?;
        if *field("group_size") != json!(format.group()) {
            return Err(format!(
                "{ENTRY}: group_size {} with format {}, whose scales are for {} columns",
                field("group_size"),
                format.name(),
                format.group()
            ));
        }
        let dtype = field("dtype").as_str().and_then(|d| d.parse::<DType>().ok()).filter(|d| d.is_float());
        let dtype = dtype.ok_or_else(|| format!("{ENTRY}: dtype {} is no type of weights", field("dtype")))?;
        Ok(Some(Stored { format, dtype }))
    }

    /// Writes it into a config.json. Programs that do not know the method refuse it.
    pub(crate) fn note(self, config: &mut Value) {
        config[ENTRY] = json!({
            "quant_method": METHOD,
            "version": VERSION,
            "format": self.format.name(),
            "group_size": self.format.group(),
            "dtype": self.dtype.name(),
        });
    }

    /// How every parameter lies in a directory, in the order of the table, by names without prefix.
    pub(crate) fn parts(self, arch: &Arch) -> Vec<Parts> {
        let called: Vec<String> = called_matrices(arch).into_iter().map(|p| p.name).collect();
        let parts = param_table(arch).into_iter().map(|p| {
            let tiles = match *p.shape.dims() {
                [n, k] if called.contains(&p.name) => self.format.format().tiles(n, k),
                _ => None,
            };
            let plain = (p.name.clone(), p.shape);
            match tiles {
                None => Parts { plain: Some(plain), tiles: None },
                Some(tiles) if p.name == EMBED_TOKENS => {
                    Parts { plain: Some(plain), tiles: Some((HEAD_TILES.to_owned(), tiles.into())) }
                }
                Some(tiles) => Parts { plain: None, tiles: Some((p.name, tiles.into())) },
            }
        });
        parts.collect()
    }
}

/// A config.json without what [`Stored`] wrote into it: that of the model.
#[must_use]
pub fn without_note(config: &Value) -> Cow<'_, Value> {
    let ours = config.get(ENTRY).is_some_and(|e| e.get("quant_method").is_some_and(|m| m == METHOD));
    if !ours {
        return Cow::Borrowed(config);
    }
    let mut config = config.clone();
    if let Some(map) = config.as_object_mut() {
        map.shift_remove(ENTRY);
    }
    Cow::Owned(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read() {
        for format in Quantization::ALL {
            let stored = Stored { format, dtype: DType::BF16 };
            let plain = json!({"model_type": "gemma4"});
            let mut config = plain.clone();
            stored.note(&mut config);
            assert_eq!(Stored::of(&config), Ok(Some(stored)));
            assert_eq!(
                (Stored::of(&plain), &*without_note(&config), &*without_note(&plain)),
                (Ok(None), &plain, &plain)
            );
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let mut good = json!({});
        Stored { format: Quantization::Int8, dtype: DType::F32 }.note(&mut good);
        for (key, value, part) in [
            ("version", json!(2), "version 2"),
            ("version", Value::Null, "version null"),
            ("format", json!("int2"), "int2"),
            ("group_size", json!(32), "64 columns"),
            ("dtype", json!("int8"), "dtype"),
        ] {
            let mut config = good.clone();
            config[ENTRY][key] = value;
            let error = Stored::of(&config).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        // Another's is another's matter.
        let other = json!({ENTRY: {"quant_method": "gptq"}});
        assert_eq!(Stored::of(&other), Ok(None));
        assert_eq!(*without_note(&other), other);
    }
}
