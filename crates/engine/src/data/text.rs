//! Batches from files of documents.

use std::collections::{HashSet, VecDeque};

use config::PackingKind;
use rayon::prelude::*;

use super::cursor::{Cursor, Stream, TextCursor};
use super::document::{Content, parse};
use super::index::{Index, RawDocument, Reader};
use super::order::Order;
use super::pack::{Packer, Piece, Place, Row};
use super::tokenizer::Tokenizer;
use super::{BadDocument, BatchSource, DataError, DataReport, Result, TokenBatch};

/// Documents tokenized at a time, at most.
const AHEAD: usize = 128;

/// Bytes of text tokenized at a time; one document may be more.
const AHEAD_BYTES: usize = 4 << 20;

/// Bad documents that are kept with their reasons.
const FIRST_BAD: usize = 10;

/// What to do with rows that do not fill the last batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// They are left out.
    Drop,
    /// Empty rows fill the batch.
    Pad,
    /// Empty rows fill the batch, and empty batches follow without end.
    Endless,
}

/// How batches are made.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) rows: usize,
    pub(super) seq: usize,
    pub(super) vocab_size: usize,
    /// Columns, for JSON and tables.
    pub(super) columns: Vec<String>,
    /// Whether the columns hold text, not token ids.
    pub(super) is_text: bool,
    pub(super) add_bos: bool,
    pub(super) add_eos: bool,
    pub(super) truncate: bool,
    pub(super) packing: Option<PackingKind>,
    pub(super) max_segments: Option<usize>,
    pub(super) shuffle: Option<u64>,
    pub(super) epochs: u64,
    pub(super) ending: Ending,
    pub(super) abort_on_bad: bool,
    /// Which share of the documents is read here: `(number, of how many)`.
    pub(super) shard: (u64, u64),
}

impl Settings {
    /// What must be the same for a cursor to mean the same, by the names of the keys.
    fn identity(&self, tokenizer: &Tokenizer) -> Vec<(String, String)> {
        let tokenizer = if self.is_text { tokenizer.fingerprint() } else { "none" };
        let packing = self.packing.map_or("none", PackingKind::as_str);
        let pairs: [(&str, String); 9] = [
            ("max_target_length", self.seq.to_string()),
            ("the tokenizer", tokenizer.to_owned()),
            ("the columns", format!("{:?} of {}", self.columns, if self.is_text { "text" } else { "ids" })),
            ("add_bos", self.add_bos.to_string()),
            ("add_eos", self.add_eos.to_string()),
            ("use_truncation", self.truncate.to_string()),
            ("packing", packing.to_owned()),
            ("the shuffle", self.shuffle.map_or("off".to_owned(), |seed| format!("seed {seed}"))),
            ("the share of the documents", format!("{} of {}", self.shard.0, self.shard.1)),
        ];
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// A document ready to be packed, or what became of it.
#[derive(Debug)]
struct Loaded {
    document: u64,
    /// Where the stream stands behind it.
    behind: Standing,
    outcome: Outcome,
}

#[derive(Debug)]
enum Outcome {
    Tokens {
        ids: Vec<i32>,
        cut: u64,
    },
    Empty,
    Bad(String),
    /// An id that the model does not have.
    Foreign(i64),
}

/// The next place to read: epochs begun before it, and its number in the order of its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    epoch: u64,
    position: u64,
}

/// The document being packed.
#[derive(Debug, Clone, Default)]
struct Current {
    document: u64,
    ids: Vec<i32>,
    /// Tokens of it that are in rows.
    done: usize,
}

/// Batches from files of documents.
#[derive(Debug)]
pub(super) struct TextSource {
    settings: Settings,
    tokenizer: Tokenizer,
    index: Index,
    reader: Reader,
    packer: Packer,
    standing: Standing,
    current: Current,
    /// Documents tokenized and not yet packed; not part of the state.
    ahead: VecDeque<Loaded>,
    batches: u64,
    /// Whether this epoch had a document that could be used.
    is_useful: bool,
    report: DataReport,
    bad: HashSet<u64>,
}

impl TextSource {
    /// Makes a source.
    ///
    /// # Errors
    /// When there is no document.
    pub(super) fn new(settings: Settings, tokenizer: Tokenizer, index: Index) -> Result<Self> {
        let packer = Packer::new(settings.packing, settings.seq, settings.max_segments, settings.rows);
        let standing = Standing { epoch: 0, position: settings.shard.0 };
        let source = TextSource {
            settings,
            tokenizer,
            index,
            reader: Reader::default(),
            packer,
            standing,
            current: Current::default(),
            ahead: VecDeque::new(),
            batches: 0,
            is_useful: false,
            report: DataReport::default(),
            bad: HashSet::new(),
        };
        if source.index.len() <= source.settings.shard.0 {
            return Err(source.nothing());
        }
        Ok(source)
    }

    fn nothing(&self) -> DataError {
        let mut reason = format!("no document of {} can be used", self.index.len());
        if let Some(first) = self.report.first_bad.first() {
            reason += &format!("; the first: {first}");
        } else if self.index.len() > 0 {
            reason += ": they are empty";
        }
        DataError::Empty { files: self.index.names(), reason }
    }

    /// The next place, if there is one.
    fn after(&self, at: Standing) -> Standing {
        let (first, count) = self.settings.shard;
        match at.position.checked_add(count) {
            Some(position) if position < self.index.len() => Standing { position, ..at },
            _ => Standing { epoch: at.epoch + 1, position: first },
        }
    }

    /// Tokenizes the next documents.
    fn read_ahead(&mut self) -> Result<()> {
        let mut next = self.standing;
        let order = |epoch| Order::new(self.index.len(), self.settings.shuffle, epoch);
        let mut orders = (next.epoch, order(next.epoch));
        let mut raw: Vec<(u64, Standing, RawDocument)> = Vec::new();
        let mut bytes = 0;
        while raw.len() < AHEAD && bytes < AHEAD_BYTES && next.epoch < self.settings.epochs {
            if orders.0 != next.epoch {
                orders = (next.epoch, order(next.epoch));
            }
            let document = orders.1.at(next.position);
            next = self.after(next);
            let line = self.reader.read(&self.index, document)?;
            bytes += line.line.as_ref().map_or(0, Vec::len);
            raw.push((document, next, line));
        }
        let tokens = |(document, behind, raw): (u64, Standing, RawDocument)| {
            let outcome = outcome(&self.settings, &self.tokenizer, raw);
            Loaded { document, behind, outcome }
        };
        let loaded: Vec<Loaded> = raw.into_par_iter().map(tokens).collect();
        self.ahead.extend(loaded);
        Ok(())
    }

    /// Makes the next usable document the current one; false at the end.
    fn next_document(&mut self) -> Result<bool> {
        while self.standing.epoch < self.settings.epochs {
            if self.ahead.is_empty() {
                self.read_ahead()?;
            }
            let Some(next) = self.ahead.front() else { return Ok(false) };
            // An error leaves the document where it is: whoever asks again gets the same answer.
            match &next.outcome {
                Outcome::Foreign(id) => {
                    let (file, line) = self.index.place(next.document);
                    let at = format!("{}:{line}", file.display());
                    return Err(DataError::Vocabulary { at, id: *id, vocab_size: self.settings.vocab_size });
                }
                Outcome::Bad(reason) => {
                    let (document, reason) = (next.document, reason.clone());
                    self.note_bad(document, reason)?;
                }
                Outcome::Tokens { .. } | Outcome::Empty => {}
            }
            let Some(next) = self.ahead.pop_front() else { return Ok(false) };
            let ended = self.standing.epoch;
            self.standing = next.behind;
            self.report.documents += 1;
            let mut found = false;
            match next.outcome {
                Outcome::Tokens { ids, cut } => {
                    self.report.truncated_documents += u64::from(cut > 0);
                    self.report.truncated_tokens += cut;
                    self.current = Current { document: next.document, ids, done: 0 };
                    self.is_useful = true;
                    found = true;
                }
                Outcome::Empty => self.report.empty_documents += 1,
                Outcome::Bad(_) | Outcome::Foreign(_) => {}
            }
            if self.standing.epoch > ended {
                // Another pass over nothing would go on for ever.
                if !self.is_useful {
                    return Err(self.nothing());
                }
                self.is_useful = false;
            }
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Counts a bad document; an error if the configuration says so.
    fn note_bad(&mut self, document: u64, reason: String) -> Result<()> {
        if self.bad.contains(&document) {
            return Ok(());
        }
        if self.settings.abort_on_bad {
            let (file, line) = self.index.place(document);
            return Err(DataError::Document(BadDocument { file, line, reason }));
        }
        self.bad.insert(document);
        self.report.bad_documents += 1;
        if self.report.first_bad.len() < FIRST_BAD {
            let (file, line) = self.index.place(document);
            self.report.first_bad.push(BadDocument { file, line, reason });
        }
        Ok(())
    }

    /// Reads until enough rows are ready or the documents end.
    fn fill(&mut self) -> Result<()> {
        while self.packer.ready.len() < self.settings.rows {
            let Current { document, ids, done } = &self.current;
            if let Some(piece) = Piece::cut(*document, ids, *done, self.packer.longest()) {
                self.current.done += piece.len();
                self.packer.push(piece);
            } else if !self.next_document()? {
                self.current = Current::default();
                self.packer.flush();
                return Ok(());
            }
        }
        Ok(())
    }

    /// A batch of the rows that are ready.
    fn batch(&mut self) -> TokenBatch {
        let settings = &self.settings;
        let mut batch = TokenBatch::empty(settings.rows, settings.seq);
        let pad = self.tokenizer.pad.map_or(0, |pad| pad as i32);
        let bos = self.tokenizer.bos.map(|bos| bos as i32);
        let empty = Row::default();
        for row in 0..settings.rows {
            let filled = self.packer.ready.pop_front();
            let filled = filled.as_ref().unwrap_or(&empty);
            filled.write(&mut batch, row, pad, bos);
            self.report.tokens += filled.used() as u64;
        }
        self.report.slots += (settings.rows * settings.seq) as u64;
        self.batches += 1;
        batch
    }

    /// The tokens of a document, for a cursor that speaks of it.
    fn reload(&mut self, document: u64) -> Result<Vec<i32>> {
        let raw = self.reader.read(&self.index, document)?;
        match outcome(&self.settings, &self.tokenizer, raw) {
            Outcome::Tokens { ids, .. } => Ok(ids),
            _ => Err(damaged("it speaks of a document that cannot be used")),
        }
    }

    /// The rows that a cursor speaks of.
    fn rows(&mut self, rows: &[Vec<Place>]) -> Result<Vec<Row>> {
        let mut out = Vec::with_capacity(rows.len());
        for places in rows {
            let mut row = Row::default();
            for place in places {
                let ids = self.reload(place.document)?;
                let start = usize::try_from(place.start).map_err(|_| damaged("a place is outside its document"))?;
                let longest = usize::try_from(place.len).unwrap_or(usize::MAX).min(self.settings.seq - row.used());
                let piece = Piece::cut(place.document, &ids, start, longest);
                let piece = piece.filter(|piece| piece.len() as u64 == place.len);
                row.push(piece.ok_or_else(|| damaged("a place is outside its document or its row"))?);
            }
            out.push(row);
        }
        Ok(out)
    }

    /// Whether a cursor is of the same data and settings.
    fn check(&self, cursor: &TextCursor) -> Result<()> {
        for ((key, here), (_, then)) in self.settings.identity(&self.tokenizer).iter().zip(&cursor.settings) {
            if here != then {
                return Err(DataError::Cursor(format!("{key} is {here}, and was {then}")));
            }
        }
        let marks = self.index.marks();
        for (here, then) in marks.iter().zip(&cursor.files) {
            let why = if here.name != then.name {
                format!("the file {} stands where {} was", here.name, then.name)
            } else if here.bytes != then.bytes {
                format!("{} has {} bytes, and had {}", here.name, here.bytes, then.bytes)
            } else if here.crc32c != then.crc32c {
                format!("{} has the same length and other content", here.name)
            } else {
                continue;
            };
            return Err(DataError::Cursor(format!("the data changed: {why}")));
        }
        if marks.len() != cursor.files.len() {
            let (here, then) = (marks.len(), cursor.files.len());
            return Err(DataError::Cursor(format!("the data changed: {here} files, and were {then}")));
        }
        let (first, count) = self.settings.shard;
        let is_place = cursor.position < self.index.len() && cursor.position % count == first % count;
        if !is_place || cursor.settings.len() != self.settings.identity(&self.tokenizer).len() {
            return Err(damaged("its position is none of these documents"));
        }
        Ok(())
    }
}

fn damaged(what: &str) -> DataError {
    DataError::Cursor(format!("the record is damaged: {what}"))
}

/// What becomes of a line.
fn outcome(settings: &Settings, tokenizer: &Tokenizer, raw: RawDocument) -> Outcome {
    let content = match raw.line {
        Ok(line) => parse(&line, raw.format, &settings.columns, settings.is_text),
        Err(reason) => Err(reason),
    };
    let ids: Vec<i32> = match content {
        Err(reason) => return Outcome::Bad(reason),
        Ok(content) if content.is_empty() => return Outcome::Empty,
        Ok(Content::Text(text)) => match tokenizer.encode(&text) {
            // No id of the tokenizer is beyond the vocabulary, and no vocabulary beyond i32.
            Ok(ids) => ids.into_iter().map(|id| id as i32).collect(),
            Err(reason) => return Outcome::Bad(reason),
        },
        Ok(Content::Ids(ids)) => {
            let known = |id: i64| usize::try_from(id).is_ok_and(|id| id < settings.vocab_size);
            if let Some(id) = ids.iter().find(|id| !known(**id)) {
                return Outcome::Foreign(*id);
            }
            ids.into_iter().map(|id| id as i32).collect()
        }
    };
    if ids.is_empty() {
        return Outcome::Empty;
    }
    let (ids, cut) = framed(ids, settings, tokenizer);
    // With a single token there is nothing to predict.
    if ids.len() < 2 { Outcome::Empty } else { Outcome::Tokens { ids, cut } }
}

/// A document with its start and end tokens, cut to a sequence if that is asked for; and the number of tokens cut off.
///
/// Neither token is added where it already stands. A document that is cut does not end there and has no end token.
fn framed(mut ids: Vec<i32>, settings: &Settings, tokenizer: &Tokenizer) -> (Vec<i32>, u64) {
    let wanted = |is_wanted: bool, id: Option<u32>| id.filter(|_| is_wanted).map(|id| id as i32);
    if let Some(bos) = wanted(settings.add_bos, tokenizer.bos)
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    if let Some(eos) = wanted(settings.add_eos, tokenizer.eos)
        && ids.last() != Some(&eos)
    {
        ids.push(eos);
    }
    let cut = if settings.truncate { ids.len().saturating_sub(settings.seq) } else { 0 };
    ids.truncate(ids.len() - cut);
    (ids, cut as u64)
}

impl BatchSource for TextSource {
    fn next(&mut self) -> Result<Option<TokenBatch>> {
        self.fill()?;
        let (ready, rows) = (self.packer.ready.len(), self.settings.rows);
        if ready >= rows {
            return Ok(Some(self.batch()));
        }
        match self.settings.ending {
            Ending::Endless => Ok(Some(self.batch())),
            Ending::Pad if ready > 0 => Ok(Some(self.batch())),
            Ending::Pad => Ok(None),
            Ending::Drop if self.batches == 0 => Err(DataError::TooFew { ready, rows }),
            Ending::Drop => {
                self.report.left_over_tokens = self.packer.ready.iter().map(|row| row.used() as u64).sum();
                Ok(None)
            }
        }
    }

    fn cursor(&self) -> Cursor {
        // Of a document that is wholly packed nothing needs to be read again.
        let Current { document, ids, done } = &self.current;
        let current = Piece::cut(*document, ids, *done, 1).map(|_| (*document, *done as u64));
        let text = TextCursor {
            settings: self.settings.identity(&self.tokenizer),
            files: self.index.marks(),
            epoch: self.standing.epoch,
            position: self.standing.position,
            current,
            rows: self.packer.places(),
        };
        Cursor { batches: self.batches, stream: Stream::Text(Box::new(text)) }
    }

    fn restore(&mut self, cursor: &Cursor) -> Result<()> {
        let Stream::Text(text) = &cursor.stream else { return Err(cursor.foreign("text files")) };
        self.check(text)?;
        let mut packer =
            Packer::new(self.settings.packing, self.settings.seq, self.settings.max_segments, self.settings.rows);
        packer.open = self.rows(&text.rows.open)?;
        packer.ready = self.rows(&text.rows.ready)?.into();
        let current = match text.current {
            None => Current::default(),
            Some((document, done)) => {
                let ids = self.reload(document)?;
                let done = usize::try_from(done).ok().filter(|done| *done < ids.len());
                let done = done.ok_or_else(|| damaged("it stands behind the end of a document"))?;
                Current { document, ids, done }
            }
        };
        self.packer = packer;
        self.current = current;
        self.standing = Standing { epoch: text.epoch, position: text.position };
        self.ahead.clear();
        self.batches = cursor.batches;
        // What came before in this epoch is not known; it may have been useful. At its beginning nothing came before.
        self.is_useful = text.position != 0;
        Ok(())
    }

    fn report(&self) -> DataReport {
        self.report.clone()
    }
}
