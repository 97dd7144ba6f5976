//! The memory of the KV cache: pages of [`PAGE`](crate::ops::PAGE) tokens, allocated once. Who owns which page is the
//! engine's business.

use half::bf16;

use crate::device::{Buffer, Device, DeviceError, MemoryKind};
use crate::ops::{self, HeadShape, Mapped, PAGE, Pages, PagesMut, TensorMaps};

/// Keys and values of every layer, in pages.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<(Buffer<bf16>, Buffer<bf16>)>,
    page_count: usize,
    heads: HeadShape,
    /// Of all keys and values, where warpgroups attend to them.
    maps: Option<TensorMaps>,
}

impl KvCache {
    /// Room for `page_count` pages of every layer.
    ///
    /// # Errors
    /// No memory, or a count of 0.
    pub fn new(device: &Device, layers: usize, heads: HeadShape, page_count: usize) -> Result<Self, DeviceError> {
        let elements = page_count.checked_mul(heads.page_elements()).ok_or_else(|| {
            DeviceError::InvalidParameter(format!("a KV cache of {page_count} pages is larger than any memory"))
        })?;
        let layers: Vec<_> = (0..layers)
            .map(|layer| {
                let half =
                    |what| device.alloc_unwritten(elements, MemoryKind::KvCache, &format!("{what}, layer {layer}"));
                Ok((half("keys")?, half("values")?))
            })
            .collect::<Result<_, DeviceError>>()?;
        let mut maps = None;
        if ops::wgmma_attends(device, heads) {
            let keys = layers.iter().map(|(keys, _)| Mapped::Pages(keys.as_slice()));
            let values = layers.iter().map(|(_, values)| Mapped::Pages(values.as_slice()));
            maps = Some(TensorMaps::new(device, keys.chain(values))?);
        }
        Ok(Self { layers, page_count, heads, maps })
    }

    /// Bytes of one page over all layers.
    #[must_use]
    pub fn page_bytes(layers: usize, heads: HeadShape) -> u64 {
        (2 * layers * heads.page_elements() * size_of::<bf16>()) as u64
    }

    /// Pages.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.page_count
    }

    /// Tokens that fit.
    #[must_use]
    pub fn capacity_tokens(&self) -> usize {
        self.page_count * PAGE
    }

    /// Layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// A number that tells this cache's memory from others that live at the same time.
    pub(super) fn identity(&self) -> u64 {
        self.layers.first().map_or(0, |(keys, _)| keys.as_slice().address())
    }

    /// A layer's pages, to read.
    pub(super) fn pages(&self, layer: usize) -> Pages<'_> {
        let (keys, values) = &self.layers[layer];
        Pages { keys: keys.as_slice(), values: values.as_slice() }
    }

    /// The tensor maps of all layers' pages, where warpgroups attend to them.
    pub(super) fn maps(&self) -> Option<&TensorMaps> {
        self.maps.as_ref()
    }

    /// All layers' pages, to write.
    pub(super) fn all_pages_mut(&mut self) -> impl Iterator<Item = PagesMut<'_>> {
        self.layers
            .iter_mut()
            .map(|(keys, values)| PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() })
    }

    /// A layer's keys and values, to write.
    pub(super) fn pages_mut(&mut self, layer: usize) -> (&mut Buffer<bf16>, &mut Buffer<bf16>) {
        let (keys, values) = &mut self.layers[layer];
        (keys, values)
    }

    /// Overwrites a page with NaN, in every layer. For tests: whoever reads a place before it is written shows it.
    ///
    /// # Errors
    /// A page outside the cache, or the device's error.
    pub fn poison(&mut self, device: &Device, page: u32) -> Result<(), DeviceError> {
        let elements = self.heads.page_elements();
        let range = page as usize * elements..(page as usize + 1) * elements;
        let poison = vec![bf16::NAN; elements];
        for (keys, values) in &mut self.layers {
            device.upload(keys.slice_mut(range.clone())?, &poison)?;
            device.upload(values.slice_mut(range.clone())?, &poison)?;
        }
        Ok(())
    }

    /// Makes every page zeros. For tests of equality.
    ///
    /// # Errors
    /// The device's error.
    pub fn clear(&mut self, device: &Device) -> Result<(), DeviceError> {
        for (keys, values) in &mut self.layers {
            device.fill_zero(keys)?;
            device.fill_zero(values)?;
        }
        Ok(())
    }

    /// How many of all elements, used or not, differ in their bits from those of another cache of this size. For tests of
    /// equality.
    ///
    /// # Errors
    /// Another size, or the device's error.
    pub fn differing(&self, device: &Device, other: &Self) -> Result<u64, DeviceError> {
        let mut count = 0;
        for ((keys, values), (other_keys, other_values)) in self.layers.iter().zip(&other.layers) {
            for (a, b) in [(keys, other_keys), (values, other_values)] {
                count += u64::from(ops::differing(device, &a.as_slice(), &b.as_slice())?);
            }
        }
        Ok(count)
    }

    /// The bits of the keys and values of `tokens` tokens of a sequence whose pages are `page_table`: every layer's keys
    /// \[G, D\] and values \[G, D\] of token 0, then of token 1, and so on. For tests of equality.
    ///
    /// # Errors
    /// A page outside the cache, or the device's error.
    pub fn download(&self, device: &Device, page_table: &[u32], tokens: usize) -> Result<Vec<u16>, DeviceError> {
        let HeadShape { kv_heads, width, .. } = self.heads;
        let page_elements = self.heads.page_elements();
        let mut bits = Vec::new();
        for (keys, values) in &self.layers {
            for (index, &page) in page_table.iter().enumerate().take(tokens.div_ceil(PAGE)) {
                let range = page as usize * page_elements..(page as usize + 1) * page_elements;
                let keys = device.download(keys.slice(range.clone())?)?;
                let values = device.download(values.slice(range)?)?;
                for token in 0..PAGE.min(tokens - index * PAGE) {
                    for head in 0..kv_heads {
                        let start = head * PAGE * width;
                        let key = &keys[start + token * width..start + (token + 1) * width];
                        bits.extend(key.iter().map(|value| value.to_bits()));
                        bits.extend((0..width).map(|d| values[start + d * PAGE + token].to_bits()));
                    }
                }
            }
        }
        Ok(bits)
    }
}
