//! What `info` shows of an image, with qemu-img's keys. Read from the header alone.

use block_core::image::ImageInfo;
use serde_json::{Map, Value, json};

use crate::{
    compress::Codec,
    layout::{Header, Incompatible},
};

/// The information of an image with this header.
pub fn image_info(header: &Header) -> ImageInfo {
    let backing_filename = header.backing_file_name();
    // A format that is left over says nothing.
    let backing_format = backing_filename
        .as_ref()
        .and(header.extensions.backing_format.clone());
    ImageInfo {
        cluster_size: Some(header.geometry().cluster_size()),
        dirty: header.is_dirty(),
        encrypted: header.crypt_method != 0,
        compressed_plaintext: false,
        compressed: false,
        backing_filename,
        backing_format,
        actual_size: None,
        snapshots: Vec::new(),
        format_specific: Some(("qcow2".into(), format_specific(header))),
    }
}

/// Puts the section about encryption where qemu-img has it: behind the refcount width.
pub(crate) fn add_encryption(data: &mut Value, encryption: Value) {
    if let Some(map) = data.as_object_mut() {
        let at = map.keys().position(|key| key == "refcount-bits");
        let at = at.map_or(map.len(), |at| at + 1);
        map.shift_insert(at, "encrypt".into(), encryption);
    }
}

impl crate::bitmaps::Stored {
    /// Puts the stored bitmaps into the `format-specific` section, where qemu-img has them.
    pub(crate) fn add_to(&self, info: &mut ImageInfo) {
        let (Some(list), Some((_, Value::Object(map)))) = (self.info(), &mut info.format_specific)
        else {
            return;
        };
        let mut with = Map::new();
        for (key, value) in std::mem::take(map) {
            if key == "refcount-bits" {
                with.insert("bitmaps".into(), list.clone());
            }
            with.insert(key, value);
        }
        *map = with;
    }
}

/// The `data` of the `format-specific` section.
fn format_specific(header: &Header) -> Value {
    let refcount_bits = header.geometry().refcount_bits();
    let compression = Codec::from_type(header.compression_type).map(Codec::name);
    if header.version < 3 {
        return json!({
            "compat": "0.10",
            "compression-type": compression,
            "refcount-bits": refcount_bits,
        });
    }
    let mut data = json!({
        "compat": "1.1",
        "compression-type": compression,
        "lazy-refcounts": header.lazy_refcounts(),
        "refcount-bits": refcount_bits,
    });
    if let Some(map) = data.as_object_mut() {
        // Also where a name is left over from another program; no file is opened for that.
        if let Some(name) = &header.extensions.data_file {
            map.insert("data-file".into(), String::from_utf8_lossy(name).into());
        }
        if header.incompatible.contains(Incompatible::DATA_FILE) {
            map.insert("data-file-raw".into(), header.has_raw_data_file().into());
        }
        map.insert("corrupt".into(), header.is_corrupt().into());
        let extended = header.incompatible.contains(Incompatible::EXTENDED_L2);
        map.insert("extended-l2".into(), extended.into());
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{Parameters, Plan};

    fn info(parameters: Parameters) -> Value {
        let header = Plan::new(&parameters).unwrap().header(&parameters);
        image_info(&header).format_specific.unwrap().1
    }

    #[test]
    fn the_keys_are_those_of_qemu_img_in_its_order() {
        let v3 = info(Parameters {
            lazy_refcounts: true,
            ..Parameters::default()
        });
        assert_eq!(
            v3.to_string(),
            r#"{"compat":"1.1","compression-type":"zlib","lazy-refcounts":true,"refcount-bits":16,"corrupt":false,"extended-l2":false}"#
        );
        let v2 = info(Parameters {
            version: 2,
            ..Parameters::default()
        });
        assert_eq!(
            v2.to_string(),
            r#"{"compat":"0.10","compression-type":"zlib","refcount-bits":16}"#
        );
    }
}
