//! Where the model is: the folder that was asked for, or the demo model that ships with the repository.

use std::path::{Path, PathBuf};

/// The demo model's place in the repository.
const DEMO: &str = "models/demo";

/// The folder of `--model`, else that of the demo model.
pub(crate) fn find(asked: Option<&Path>) -> anyhow::Result<PathBuf> {
    match asked {
        Some(folder) => Ok(folder.to_path_buf()),
        None => first_with_demo(&places()).ok_or_else(|| {
            anyhow::anyhow!(
                "the demo model ({DEMO}) is neither here nor beside the program; give a model with --model DIR"
            )
        }),
    }
}

/// What a model is called: its folder's name.
pub(crate) fn name(folder: &Path) -> String {
    let absolute = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    absolute.file_name().map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// The current folder, the program's folder and those above it (`target/release` lies in the repository), and the
/// repository the program was built in.
fn places() -> Vec<PathBuf> {
    let program = std::env::current_exe().and_then(|path| path.canonicalize()).unwrap_or_default();
    let above_program = program.ancestors().skip(1).map(Path::to_path_buf);
    let built_in = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    [PathBuf::from(".")].into_iter().chain(above_program).chain([built_in]).collect()
}

fn first_with_demo(places: &[PathBuf]) -> Option<PathBuf> {
    places.iter().map(|place| place.join(DEMO)).find(|folder| folder.join("config.json").is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_asked_for_is_taken_as_it_is() {
        assert_eq!(find(Some(Path::new("/nowhere/model"))).unwrap(), Path::new("/nowhere/model"));
    }

    #[test]
    fn the_first_place_with_a_demo_model_wins() {
        let (empty, with) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let places = [empty.path().to_path_buf(), with.path().to_path_buf()];
        assert_eq!(first_with_demo(&places), None);
        std::fs::create_dir_all(with.path().join(DEMO)).unwrap();
        assert_eq!(first_with_demo(&places), None);
        std::fs::write(with.path().join(DEMO).join("config.json"), "{}").unwrap();
        assert_eq!(first_with_demo(&places), Some(with.path().join(DEMO)));
    }

    #[test]
    fn the_repository_is_searched_whatever_the_current_folder() {
        assert!(places().contains(&PathBuf::from(env!("CARGO_MANIFEST_DIR"))));
    }

    #[test]
    fn a_model_is_named_after_its_folder() {
        assert_eq!(name(Path::new("/models/Qwen2.5-0.5B/")), "Qwen2.5-0.5B");
        let here = tempfile::tempdir().unwrap();
        let expected = here.path().file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(name(&here.path().join(".")), expected);
    }
}
