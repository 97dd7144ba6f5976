//! A small download that is begun now and collected later, while the device goes on with other work.

use cuda_std::Element;

use super::{Device, DeviceError, Slice};

/// Values on their way from the device. Two may be on their way at once; of a third one begun before the first is collected,
/// the first is lost, and collecting it is an error.
#[derive(Debug)]
pub struct Pending<T>(Values<T>);

#[derive(Debug)]
enum Values<T> {
    /// The CPU works while the caller waits: they are here.
    Here(Vec<T>),
    Coming {
        number: u64,
        len: usize,
    },
}

impl Device {
    /// Begins to download a few values (16 KiB at most), as they are after all work before this call.
    ///
    /// # Errors
    /// Too many values, or the device's error.
    pub fn begin_download<'a, T: Element>(&self, source: impl Into<Slice<'a, T>>) -> Result<Pending<T>, DeviceError> {
        let source = source.into();
        Ok(Pending(match self {
            Self::Cpu(_) => Values::Here(self.download(source)?),
            Self::Cuda(device) => {
                self.check_view(source.device())?;
                Values::Coming { number: device.begin_download(source)?, len: source.len() }
            }
        }))
    }

    /// The values of a download, for which this waits.
    ///
    /// # Errors
    /// Too many were begun since, or the device's error.
    pub fn collect<T: Element>(&self, pending: Pending<T>) -> Result<Vec<T>, DeviceError> {
        match (pending.0, self) {
            (Values::Here(values), _) => Ok(values),
            (Values::Coming { number, len }, Self::Cuda(device)) => {
                // SAFETY: all bits are values of an element, zeros too.
                let mut values = vec![unsafe { std::mem::zeroed() }; len];
                device.collect_download(number, &mut values)?;
                Ok(values)
            }
            (Values::Coming { .. }, Self::Cpu(_)) => {
                Err(DeviceError::InvalidParameter("the download was begun on another device".to_owned()))
            }
        }
    }
}
