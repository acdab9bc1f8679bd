//! Pieces of documents in rows.
//!
//! What is open is remembered as places in documents, not as tokens: that keeps a cursor small, and it is read again
//! when the cursor is restored.

use std::collections::VecDeque;

use config::PackingKind;
use serde::{Deserialize, Serialize};

use super::TokenBatch;

/// Fewest rows that stay open while packing first-fit. More waste less and keep documents waiting longer.
const OPEN_ROWS: usize = 32;

/// A run of tokens of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "[u64; 3]", into = "[u64; 3]")]
pub(super) struct Place {
    /// Number of the document in the index.
    pub(super) document: u64,
    /// Its first token.
    pub(super) start: u64,
    /// Number of tokens.
    pub(super) len: u64,
}

impl From<[u64; 3]> for Place {
    fn from([document, start, len]: [u64; 3]) -> Self {
        Place { document, start, len }
    }
}

impl From<Place> for [u64; 3] {
    fn from(place: Place) -> Self {
        [place.document, place.start, place.len]
    }
}

/// A piece with its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    place: Place,
    /// Its tokens, and the one after them if the document goes on.
    ids: Vec<i32>,
}

impl Piece {
    /// The piece of a document from `start`, at most `longest` tokens long; `None` behind the last token that has
    /// another after it.
    ///
    /// A first piece of one token is refused too: there would be nothing to predict.
    pub(super) fn cut(document: u64, tokens: &[i32], start: usize, longest: usize) -> Option<Self> {
        let left = tokens.len().checked_sub(start)?;
        if left < 2 || longest == 0 {
            return None;
        }
        let len = left.min(longest);
        let ids = tokens[start..start + (len + 1).min(left)].to_vec();
        Some(Piece { place: Place { document, start: start as u64, len: len as u64 }, ids })
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> usize {
        self.place.len as usize
    }
}

/// Pieces that will be one row of a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Row {
    pieces: Vec<Piece>,
    used: usize,
}

impl Row {
    pub(super) fn push(&mut self, piece: Piece) {
        self.used += piece.len();
        self.pieces.push(piece);
    }

    /// Tokens in it.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    fn places(&self) -> Vec<Place> {
        self.pieces.iter().map(|piece| piece.place).collect()
    }

    /// Writes it as row `row` of a batch. Targets that are `pad` or `bos` do not count.
    pub(super) fn write(&self, batch: &mut TokenBatch, row: usize, pad: i32, bos: Option<i32>) {
        let mut at = row * batch.seq;
        batch.inputs[at..at + batch.seq].fill(pad);
        batch.targets[at..at + batch.seq].fill(pad);
        for (segment, piece) in (1..).zip(&self.pieces) {
            for position in 0..piece.len() {
                batch.inputs[at] = piece.ids[position];
                batch.inputs_position[at] = position as i32;
                batch.inputs_segmentation[at] = segment;
                if let Some(target) = piece.ids.get(position + 1) {
                    batch.targets[at] = *target;
                    if *target != pad && Some(*target) != bos {
                        batch.targets_segmentation[at] = segment;
                    }
                }
                at += 1;
            }
        }
    }
}

/// The rows that are open and those that are ready, as places.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Places {
    pub(super) open: Vec<Vec<Place>>,
    pub(super) ready: Vec<Vec<Place>>,
}

/// Puts pieces into rows.
#[derive(Debug, Clone)]
pub(super) struct Packer {
    /// How; `None` gives every piece a row of its own.
    kind: Option<PackingKind>,
    seq: usize,
    max_segments: usize,
    /// Most rows that are open at a time.
    most_open: usize,
    pub(super) open: Vec<Row>,
    pub(super) ready: VecDeque<Row>,
}

impl Packer {
    pub(super) fn new(kind: Option<PackingKind>, seq: usize, max_segments: Option<usize>, rows: usize) -> Self {
        let most_open = if kind == Some(PackingKind::FirstFit) { rows.max(OPEN_ROWS) } else { 1 };
        let max_segments = max_segments.unwrap_or(usize::MAX).max(1);
        Packer { kind, seq, max_segments, most_open, open: Vec::new(), ready: VecDeque::new() }
    }

    /// Most tokens that the next piece may have.
    pub(super) fn longest(&self) -> usize {
        match (self.kind, self.open.first()) {
            (Some(PackingKind::ConcatThenSplit), Some(row)) => self.seq - row.used,
            _ => self.seq,
        }
    }

    /// Puts a piece of at most [`Self::longest`] tokens into a row.
    pub(super) fn push(&mut self, piece: Piece) {
        if self.kind.is_none() {
            let mut row = Row::default();
            row.push(piece);
            self.ready.push_back(row);
            return;
        }
        let fits = |row: &Row| row.used + piece.len() <= self.seq && row.pieces.len() < self.max_segments;
        let at = if let Some(at) = self.open.iter().position(fits) {
            at
        } else {
            // The fullest row has the least to hope for; of equals the oldest goes.
            while self.open.len() >= self.most_open {
                let Some(fullest) = (0..self.open.len()).rev().max_by_key(|at| self.open[*at].used) else { break };
                self.ready.push_back(self.open.remove(fullest));
            }
            self.open.push(Row::default());
            self.open.len() - 1
        };
        self.open[at].push(piece);
        if self.open[at].used >= self.seq || self.open[at].pieces.len() >= self.max_segments {
            self.ready.push_back(self.open.remove(at));
        }
    }

    /// Closes every row.
    pub(super) fn flush(&mut self) {
        self.ready.extend(self.open.drain(..));
    }

    /// What is open and ready.
    pub(super) fn places(&self) -> Places {
        Places {
            open: self.open.iter().map(Row::places).collect(),
            ready: self.ready.iter().map(Row::places).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(document: u64, len: usize) -> Piece {
        let tokens: Vec<i32> = (0..len as i32).map(|at| 100 * document as i32 + at).collect();
        Piece::cut(document, &tokens, 0, len).unwrap()
    }

    fn lengths(rows: &VecDeque<Row>) -> Vec<Vec<usize>> {
        rows.iter().map(|row| row.pieces.iter().map(Piece::len).collect()).collect()
    }

    #[test]
    fn pieces_know_the_token_after_them() {
        let tokens = [10, 11, 12, 13, 14];
        let cut = |start, longest| Piece::cut(0, &tokens, start, longest).map(|piece| (piece.len(), piece.ids));
        assert_eq!(cut(0, 2), Some((2, vec![10, 11, 12])));
        assert_eq!(cut(2, 2), Some((2, vec![12, 13, 14])));
        assert_eq!(cut(2, 3), Some((3, vec![12, 13, 14])));
        // The last token alone predicts nothing.
        assert_eq!(cut(4, 2), None);
        assert_eq!(cut(6, 2), None);
        assert_eq!(cut(0, 0), None);
        assert_eq!(Piece::cut(0, &[1], 0, 5), None);
    }

    #[test]
    fn first_fit_keeps_documents_whole() {
        let mut packer = Packer::new(Some(PackingKind::FirstFit), 10, None, 1);
        packer.most_open = 2;
        for (document, len) in [6, 7, 4, 2, 9, 3].into_iter().enumerate() {
            packer.push(piece(document as u64, len));
        }
        // 6+4 is full; 3 fits neither beside 7+2 nor beside 9, and of these equally full ones the older goes.
        assert_eq!(lengths(&packer.ready), [vec![6, 4], vec![7, 2]]);
        packer.flush();
        assert_eq!(lengths(&packer.ready), [vec![6, 4], vec![7, 2], vec![9], vec![3]]);
    }

    #[test]
    fn segments_are_limited() {
        let mut packer = Packer::new(Some(PackingKind::FirstFit), 10, Some(2), 1);
        for document in 0..5 {
            packer.push(piece(document, 2));
        }
        packer.flush();
        assert_eq!(lengths(&packer.ready), [vec![2, 2], vec![2, 2], vec![2]]);
    }

    #[test]
    fn rows_have_segments_positions_and_targets() {
        let mut packer = Packer::new(Some(PackingKind::FirstFit), 8, None, 1);
        // Document 0: start, text, padding in the middle, end. Document 1: cut behind its third token.
        packer.push(Piece::cut(0, &[2, 50, 0, 1], 0, 8).unwrap());
        packer.push(Piece::cut(1, &[2, 60, 2, 61, 62], 0, 3).unwrap());
        packer.flush();
        let mut batch = TokenBatch::empty(2, 8);
        packer.ready[0].write(&mut batch, 1, 0, Some(2));
        assert_eq!(batch.inputs[8..], [2, 50, 0, 1, 2, 60, 2, 0]);
        assert_eq!(batch.inputs_position[8..], [0, 1, 2, 3, 0, 1, 2, 0]);
        assert_eq!(batch.inputs_segmentation[8..], [1, 1, 1, 1, 2, 2, 2, 0]);
        assert_eq!(batch.targets[8..], [50, 0, 1, 0, 60, 2, 61, 0]);
        assert_eq!(batch.targets_segmentation[8..], [1, 0, 1, 0, 2, 0, 2, 0]);
        assert_eq!(batch.inputs_segmentation[..8], [0; 8]);
        assert_eq!(batch.weight(), 4);
    }
}
