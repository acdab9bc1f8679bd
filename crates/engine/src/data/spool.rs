//! Compressed files and tables, unpacked once into an unnamed temporary file that can be read at any place.
//!
//! It lies in the system's directory for temporary files (`TMPDIR`), takes the unpacked size there, and is gone when the
//! source is dropped or the process ends.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use super::files::{Compression, Format, SourceFile};
use super::{DataError, Result};

/// Unpacks a file. Tables become JSON lines of the columns asked for, a row a line.
///
/// # Errors
/// When it is damaged, or there is no room.
pub(super) fn unpack(file: fs_err::File, source: &SourceFile, columns: &[String]) -> Result<File> {
    let path = &source.path;
    if source.format == Format::Parquet {
        if source.compression != Compression::None {
            let reason = "a Parquet file is compressed inside; unpack it first".to_owned();
            return Err(DataError::File { path: path.clone(), reason });
        }
        return table(file, path, columns);
    }
    let damaged = |error: std::io::Error| DataError::File { path: path.clone(), reason: format!("damaged: {error}") };
    let input = BufReader::new(file);
    match source.compression {
        Compression::None => copy(input, path),
        Compression::Gzip => copy(flate2::bufread::MultiGzDecoder::new(input), path),
        Compression::Zstd => copy(zstd::stream::read::Decoder::with_buffer(input).map_err(damaged)?, path),
    }
}

/// An unnamed temporary file.
fn temporary() -> Result<File> {
    tempfile::tempfile().map_err(|error| {
        let reason =
            format!("no temporary file to unpack data into: {error} (the variable TMPDIR names another place)");
        DataError::File { path: std::env::temp_dir(), reason }
    })
}

fn no_room(error: &std::io::Error) -> DataError {
    let reason = format!("data cannot be unpacked there: {error} (the variable TMPDIR names another place)");
    DataError::File { path: std::env::temp_dir(), reason }
}

fn copy(mut input: impl Read, path: &Path) -> Result<File> {
    let mut out = temporary()?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = match input.read(&mut buffer) {
            Ok(0) => return Ok(out),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(DataError::File { path: path.to_owned(), reason: format!("damaged: {error}") }),
        };
        out.write_all(&buffer[..read]).map_err(|error| no_room(&error))?;
    }
}

#[cfg(not(feature = "parquet"))]
fn table(_: fs_err::File, path: &Path, _: &[String]) -> Result<File> {
    let reason =
        "this build does not read Parquet: build it with `--features parquet`, or convert the file to JSON lines";
    Err(DataError::File { path: path.to_owned(), reason: reason.to_owned() })
}

#[cfg(feature = "parquet")]
fn table(file: fs_err::File, path: &Path, columns: &[String]) -> Result<File> {
    let (file, _) = file.into_parts();
    // The library asserts some properties of what it reads.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| rows(file, columns)));
    let wrong = |reason: String| DataError::File { path: path.to_owned(), reason };
    match result {
        Ok(Ok(out)) => Ok(out),
        Ok(Err(TableError::Parquet(error))) => Err(wrong(format!("cannot be read: {error}"))),
        Ok(Err(TableError::Column(reason))) => Err(wrong(reason)),
        Ok(Err(TableError::Data(error))) => Err(error),
        Err(_) => Err(wrong("damaged: the Parquet reader failed on it".to_owned())),
    }
}

#[cfg(feature = "parquet")]
enum TableError {
    Parquet(parquet::errors::ParquetError),
    Column(String),
    Data(DataError),
}

#[cfg(feature = "parquet")]
impl From<parquet::errors::ParquetError> for TableError {
    fn from(error: parquet::errors::ParquetError) -> Self {
        TableError::Parquet(error)
    }
}

/// Writes the columns as JSON lines.
#[cfg(feature = "parquet")]
fn rows(file: File, columns: &[String]) -> std::result::Result<File, TableError> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::schema::types::Type;

    let reader = SerializedFileReader::new(file)?;
    let schema = reader.metadata().file_metadata().schema();
    let mut wanted = Vec::new();
    for column in columns {
        match schema.get_fields().iter().find(|field| field.name() == column) {
            Some(field) if wanted.contains(field) => {}
            Some(field) => wanted.push(field.clone()),
            None => {
                let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).take(8).collect();
                return Err(TableError::Column(format!("no column `{column}` (there is {})", names.join(", "))));
            }
        }
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(wanted).build()?;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, temporary().map_err(TableError::Data)?);
    for row in reader.get_row_iter(Some(projection))? {
        let mut object = serde_json::Map::new();
        for (name, field) in row?.get_column_iter() {
            let value = value(field);
            object.insert(name.clone(), value);
        }
        let written = serde_json::to_writer(&mut out, &object).map_err(std::io::Error::from);
        written.and_then(|()| out.write_all(b"\n")).map_err(|error| TableError::Data(no_room(&error)))?;
    }
    out.into_inner().map_err(|error| TableError::Data(no_room(error.error())))
}

/// Text and whole numbers as they are; of everything else only that it is something else.
#[cfg(feature = "parquet")]
fn value(field: &parquet::record::Field) -> serde_json::Value {
    use parquet::record::Field;
    use serde_json::Value;
    let other = || Value::Object(serde_json::Map::new());
    match field {
        Field::Str(text) => Value::from(text.as_str()),
        // Binary columns without the mark of a string are text in many data sets.
        Field::Bytes(bytes) => String::from_utf8(bytes.data().to_vec()).map_or_else(|_| other(), Value::from),
        Field::Byte(n) => Value::from(*n),
        Field::Short(n) => Value::from(*n),
        Field::Int(n) => Value::from(*n),
        Field::Long(n) => Value::from(*n),
        Field::UByte(n) => Value::from(*n),
        Field::UShort(n) => Value::from(*n),
        Field::UInt(n) => Value::from(*n),
        Field::ULong(n) => Value::from(*n),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(*value),
        Field::Float(_) | Field::Double(_) => Value::from(0.5),
        _ => other(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::index::{Index, Reader};

    fn texts(path: &Path, format: Format, compression: Compression) -> Result<Vec<String>> {
        let source = SourceFile { path: path.to_owned(), format, compression };
        let index = Index::build(&[source], &["text".to_owned()])?;
        let mut reader = Reader::default();
        (0..index.len()).map(|at| Ok(String::from_utf8(reader.read(&index, at)?.line.unwrap()).unwrap())).collect()
    }

    #[test]
    fn compressed_files_are_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt.gz");
        let mut gzip = Vec::new();
        // Two members, as `cat a.gz b.gz` makes them.
        for text in ["one\ntw", "o\n"] {
            let mut encoder = flate2::write::GzEncoder::new(&mut gzip, flate2::Compression::fast());
            encoder.write_all(text.as_bytes()).unwrap();
            encoder.finish().unwrap();
        }
        fs_err::write(&path, &gzip).unwrap();
        assert_eq!(texts(&path, Format::Text, Compression::Gzip).unwrap(), ["one", "two"]);
        fs_err::write(&path, &gzip[..gzip.len() - 9]).unwrap();
        assert!(texts(&path, Format::Text, Compression::Gzip).unwrap_err().to_string().contains("a.txt.gz: damaged"));
        let zstd = zstd::encode_all(&b"three\nfour"[..], 1).unwrap();
        fs_err::write(&path, &zstd).unwrap();
        assert_eq!(texts(&path, Format::Text, Compression::Zstd).unwrap(), ["three", "four"]);
        assert!(texts(&path, Format::Text, Compression::Gzip).unwrap_err().to_string().contains("damaged"));
        assert!(texts(&path, Format::Parquet, Compression::Gzip).unwrap_err().to_string().contains("unpack"));
    }

    #[cfg(not(feature = "parquet"))]
    #[test]
    fn tables_need_the_feature() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        fs_err::write(&path, "PAR1").unwrap();
        let error = texts(&path, Format::Parquet, Compression::None).unwrap_err().to_string();
        assert!(error.contains("--features parquet"), "{error}");
    }

    #[cfg(feature = "parquet")]
    fn table_of(path: &Path, texts: &[&[u8]]) {
        use std::sync::Arc;

        use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
        use parquet::file::writer::SerializedFileWriter;
        use parquet::schema::parser::parse_message_type;

        let schema = "message m { required binary text (UTF8); optional group ids (LIST) \
                      { repeated group list { optional int64 element; } } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = std::fs::File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
        for group in texts.chunks(2) {
            let mut rows = writer.next_row_group().unwrap();
            let mut column = rows.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = group.iter().map(|text| ByteArray::from(text.to_vec())).collect();
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
            // Every row has the list [7, 8].
            let mut column = rows.next_column().unwrap().unwrap();
            let levels = [3i16, 3].repeat(group.len());
            let values = [7i64, 8].repeat(group.len());
            let repeats = [0i16, 1].repeat(group.len());
            column.typed::<Int64Type>().write_batch(&values, Some(&levels), Some(&repeats)).unwrap();
            column.close().unwrap();
            rows.close().unwrap();
        }
        writer.close().unwrap();
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn tables_become_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        table_of(&path, &[b"one", "zw\"ei\n".as_bytes(), b"three"]);
        let lines = texts(&path, Format::Parquet, Compression::None).unwrap();
        assert_eq!(lines, [r#"{"text":"one"}"#, r#"{"text":"zw\"ei\n"}"#, r#"{"text":"three"}"#]);
        let source = SourceFile { path: path.clone(), format: Format::Parquet, compression: Compression::None };
        let index = Index::build(std::slice::from_ref(&source), &["ids".to_owned()]).unwrap();
        assert_eq!(Reader::default().read(&index, 1).unwrap().line, Ok(br#"{"ids":[7,8]}"#.to_vec()));
        assert_eq!(index.place(2), (path.clone(), 3));
        let error = Index::build(&[source], &["body".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("no column `body` (there is text, ids)"), "{error}");
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn damaged_tables_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        table_of(&path, &[b"one", b"two", b"\xff\xfe"]);
        let whole = fs_err::read(&path).unwrap();
        // A string that is no UTF-8.
        assert!(texts(&path, Format::Parquet, Compression::None).is_err());
        for cut in [0, 4, whole.len() / 2, whole.len() - 1] {
            fs_err::write(&path, &whole[..cut]).unwrap();
            let error = texts(&path, Format::Parquet, Compression::None).unwrap_err().to_string();
            assert!(error.contains("a.parquet: cannot be read"), "{error}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            fs_err::write(&path, bytes).unwrap();
            // Whatever comes out, it comes out as a result.
            let _ = texts(&path, Format::Parquet, Compression::None);
        }
    }
}
