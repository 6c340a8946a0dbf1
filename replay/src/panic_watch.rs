//! Reads the guest's console for the line by which Linux says that it panicked.
//!
//! A kernel without a pvpanic driver tells nobody else. The words are `panic()`'s own
//! (Linux, kernel/panic.c).

/// What Linux prints when it panics, before the reason.
const PANIC: &str = "Kernel panic - not syncing: ";
/// Longer lines are cut: a console is free text.
const LINE_MAX: usize = 1024;

/// Looks at console output line by line.
#[derive(Clone, Debug, Default)]
pub struct PanicWatch {
    line: Vec<u8>,
    message: Option<String>,
}

impl PanicWatch {
    /// Sees more output.
    pub fn watch(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                self.end_line();
            } else if self.line.len() < LINE_MAX {
                self.line.push(byte);
            }
        }
    }

    /// The reason of the first panic seen.
    pub fn message(&self) -> Option<String> {
        self.message.clone()
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if self.message.is_some() {
            return;
        }
        let text = String::from_utf8_lossy(&line);
        if let Some(at) = text.find(PANIC) {
            self.message = Some(text[at + PANIC.len()..].trim_end().to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::PanicWatch;

    #[test]
    fn a_panic_is_found_in_a_line_that_comes_byte_by_byte() {
        let mut watch = PanicWatch::default();
        for byte in b"[    1.5] Kernel panic - not syncing: Attempted to kill init!\r\n[ 2] more\n"
        {
            assert!(watch.message().is_none() || *byte != b'!');
            watch.watch(&[*byte]);
        }
        assert_eq!(watch.message().as_deref(), Some("Attempted to kill init!"));
    }
}
