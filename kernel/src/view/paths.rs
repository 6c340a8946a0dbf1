//! The path of a file that the kernel has open.

use super::error::ViewError;
use super::memory::Memory;
use super::types::{Field, Types};

/// A path is no longer (PATH_MAX of include/uapi/linux/limits.h).
const PATH_BYTES: usize = 4096;
/// It has no more parts and mounts: a path of more is longer, or made to keep us busy.
const PARTS: usize = 256;
/// A name is no longer (NAME_MAX of the same file).
const NAME_BYTES: u64 = 255;

/// What is to be known of open files, directory entries and mounts.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    file_mount: Field,
    file_entry: Field,
    parent: Field,
    hashed: Field,
    name: Field,
    name_bytes: Field,
    mount_root: Field,
    mount: Field,
    mount_parent: Field,
    mount_point: Field,
}

impl Paths {
    pub(super) fn find(types: &Types<'_>) -> Result<Paths, ViewError> {
        Ok(Paths {
            file_mount: types.field("file.f_path.mnt")?,
            file_entry: types.field("file.f_path.dentry")?,
            parent: types.field("dentry.d_parent")?,
            hashed: types.field("dentry.d_hash.pprev")?,
            name: types.field("dentry.d_name.name")?,
            name_bytes: types.field("dentry.d_name.len")?,
            mount_root: types.field("vfsmount.mnt_root")?,
            mount: types.field("mount.mnt")?,
            mount_parent: types.field("mount.mnt_parent")?,
            mount_point: types.field("mount.mnt_mountpoint")?,
        })
    }

    /// The path of the `struct file` at `file`, from the root of the first mount; as `d_path` of fs/d_path.c makes it, but
    /// for its beginning: a program in a root of its own (chroot, container) has a shorter one.
    pub(super) fn of_file(&self, memory: &mut dyn Memory, file: u64) -> Result<String, ViewError> {
        let mut mounted = memory.field(file, self.file_mount)?;
        let mut entry = memory.field(file, self.file_entry)?;
        let first_root = memory.field(mounted, self.mount_root)?;
        let is_deleted = entry != first_root && memory.field(entry, self.hashed)? == 0;
        let (mut parts, mut bytes) = (Vec::new(), 0);
        for _ in 0..PARTS {
            if entry == memory.field(mounted, self.mount_root)? {
                // From what is mounted to the directory that it is mounted on.
                let mount = self.mount.container(mounted);
                let above = memory.field(mount, self.mount_parent)?;
                if above == mount {
                    return Ok(path(&parts, is_deleted));
                }
                entry = memory.field(mount, self.mount_point)?;
                mounted = self.mount.of(above);
                continue;
            }
            let name = self.name(memory, entry)?;
            bytes += name.len() + 1;
            parts.push(name);
            let parent = memory.field(entry, self.parent)?;
            if parent == entry {
                // In no directory, such as what memfd_create makes, or outside of what is mounted.
                return Ok(path(&parts, is_deleted));
            }
            if bytes > PATH_BYTES {
                break;
            }
            entry = parent;
        }
        Err(ViewError::TooMany {
            what: "parts of a path",
            limit: PARTS,
        })
    }

    fn name(&self, memory: &mut dyn Memory, entry: u64) -> Result<String, ViewError> {
        let at = memory.field(entry, self.name)?;
        let bytes = memory.field(entry, self.name_bytes)?.min(NAME_BYTES);
        let mut name = vec![0; bytes as usize];
        memory.fill(at, self.name.name, &mut name)?;
        Ok(String::from_utf8_lossy(&name).into_owned())
    }
}

/// The parts were found from the last to the first.
fn path(parts: &[String], is_deleted: bool) -> String {
    let mut path: String = parts
        .iter()
        .rev()
        .flat_map(|part| ["/", part.as_str()])
        .collect();
    if path.is_empty() {
        path.push('/');
    }
    if is_deleted {
        path.push_str(" (deleted)");
    }
    path
}
