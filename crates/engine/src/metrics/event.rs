//! The few messages of TensorBoard's event files, encoded by hand: they have not changed in ten years, and a handful
//! of fields does not pay for generated code.
//!
//! Field numbers are those of `event.proto`, `summary.proto`, `tensor.proto` and `tensor_shape.proto`.

/// One event of a file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Event<'a> {
    /// The first of every file.
    FileVersion,
    /// A (re)start: whatever was recorded for this step and later ones no longer counts.
    SessionStart,
    /// Values of one step.
    Scalars(&'a [(&'a str, f64)]),
    /// Markdown under a tag.
    Text(&'a str, &'a str),
}

impl Event<'_> {
    /// The message: `seconds` since 1970 and a step.
    pub(super) fn encode(self, seconds: f64, step: u64) -> Vec<u8> {
        let mut m = Message::default();
        m.fixed64(1, seconds.to_bits());
        if step != 0 {
            m.varint(2, step);
        }
        match self {
            Event::FileVersion => m.bytes(3, b"brain.Event:2"),
            Event::SessionStart => {
                let mut log = Message::default();
                log.varint(1, 1); // SessionStatus::START
                m.bytes(7, &log.0);
            }
            Event::Scalars(values) => {
                let mut summary = Message::default();
                for (tag, value) in values {
                    let mut v = Message::default();
                    v.bytes(1, tag.as_bytes());
                    // The format has 32 bits: enough for a plot; the JSON lines have all of them.
                    v.fixed32(2, (*value as f32).to_bits());
                    summary.bytes(1, &v.0);
                }
                m.bytes(5, &summary.0);
            }
            Event::Text(tag, text) => {
                let mut v = Message::default();
                v.bytes(1, tag.as_bytes());
                v.bytes(8, &string(text));
                v.bytes(9, &plugin("text"));
                let mut summary = Message::default();
                summary.bytes(1, &v.0);
                m.bytes(5, &summary.0);
            }
        }
        m.0
    }
}

/// A summary's metadata that names the part of TensorBoard that shows it.
fn plugin(name: &str) -> Vec<u8> {
    let (mut metadata, mut data) = (Message::default(), Message::default());
    data.bytes(1, name.as_bytes());
    metadata.bytes(1, &data.0);
    metadata.0
}

/// A tensor of one text, without dimensions: one of a dimension would be shown as a table.
fn string(text: &str) -> Vec<u8> {
    let mut tensor = Message::default();
    tensor.varint(1, 7); // DT_STRING
    tensor.bytes(2, b"");
    tensor.bytes(8, text.as_bytes());
    tensor.0
}

/// Fields in the order in which they are added.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn fixed64(&mut self, field: u64, bits: u64) {
        self.key(field, 1);
        self.0.extend_from_slice(&bits.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn fixed32(&mut self, field: u64, bits: u32) {
        self.key(field, 5);
        self.0.extend_from_slice(&bits.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Bytes of the same messages as serialised by TensorBoard's own protobuf classes.

    #[test]
    fn file_version_and_start() {
        assert_eq!(
            Event::FileVersion.encode(1_315_598_050.0, 0),
            b"\x09\x00\x00\x80\xb8\x9b\x9a\xd3\x41\x1a\x0dbrain.Event:2"
        );
        assert_eq!(
            Event::SessionStart.encode(1_315_598_050.0, 300),
            b"\x09\x00\x00\x80\xb8\x9b\x9a\xd3\x41\x10\xac\x02\x3a\x02\x08\x01"
        );
    }

    #[test]
    fn scalars() {
        assert_eq!(
            Event::Scalars(&[("learning/loss", 2.5), ("b", -1.0)]).encode(1_315_598_050.0, 7),
            b"\x09\x00\x00\x80\xb8\x9b\x9a\xd3\x41\x10\x07\x2a\x20\
              \x0a\x14\x0a\x0dlearning/loss\x15\x00\x00\x20\x40\x0a\x08\x0a\x01b\x15\x00\x00\x80\xbf"
        );
    }

    #[test]
    fn text() {
        assert_eq!(
            Event::Text("config", "# x").encode(1_315_598_050.0, 0),
            b"\x09\x00\x00\x80\xb8\x9b\x9a\xd3\x41\x2a\x1f\x0a\x1d\x0a\x06config\
              \x42\x09\x08\x07\x12\x00\x42\x03# x\x4a\x08\x0a\x06\x0a\x04text"
        );
    }
}
