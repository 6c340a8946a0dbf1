//! What an operator says of a disk.

use std::path::PathBuf;

use hindsight_devices::DiskSpec;

use super::OpenImage;

/// What an operator says of a disk: `IMG[,ro][,serial=S]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOption {
    /// The image.
    pub path: PathBuf,
    /// Whether the guest's writes are refused.
    pub read_only: bool,
    /// Its serial number.
    pub serial: String,
    /// All of that as it was said.
    pub text: String,
}

/// Parses `IMG[,ro][,serial=S]`. A comma in a name is written twice.
pub fn parse_disk(text: &str) -> Result<DiskOption, String> {
    let words = text.replace(",,", "\0");
    let mut words = words.split(',').map(|word| word.replace('\0', ","));
    let path = words.next().filter(|path| !path.is_empty());
    let mut option = DiskOption {
        path: path.ok_or("expected IMG[,ro][,serial=S]")?.into(),
        read_only: false,
        serial: String::new(),
        text: text.into(),
    };
    for word in words {
        match word.split_once('=') {
            None if word == "ro" => option.read_only = true,
            Some(("serial", serial)) if serial.len() <= 20 => option.serial = serial.into(),
            Some(("serial", serial)) => {
                return Err(format!(
                    "the serial number {serial:?} has more than 20 bytes"
                ));
            }
            _ => return Err(format!("{word:?}: expected ro or serial=S")),
        }
    }
    Ok(option)
}

impl DiskOption {
    /// The disk as the guest sees it, over `image`.
    pub fn spec(&self, image: &OpenImage) -> DiskSpec {
        DiskSpec {
            bytes: image.image.bytes,
            read_only: self.read_only,
            serial: self.serial.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn disks_are_named_with_what_is_to_be_said_of_them() {
        let option = parse_disk("a,,b.img,ro,serial=xyz").unwrap();
        assert_eq!(option.path, Path::new("a,b.img"));
        assert!(option.read_only && option.serial == "xyz");
        for bad in ["", ",ro", "a,rw", "a,serial=123456789012345678901"] {
            assert!(parse_disk(bad).is_err(), "{bad}");
        }
    }
}
